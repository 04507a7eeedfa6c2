"""What to do: from (graph, cost_model, memory_budget) to a Plan. Strategies never touch a graph."""
