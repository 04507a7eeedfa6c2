"""What to do: from (graph, cost_model, memory_budget) to a Plan. Strategies never touch a graph."""

from collections.abc import Mapping

from graphswap.strategies.auto import Auto
from graphswap.strategies.base import Strategy
from graphswap.strategies.checkmate import Checkmate
from graphswap.strategies.chen import Chen
from graphswap.strategies.greedy import Greedy
from graphswap.strategies.joint import Joint
from graphswap.strategies.karma import Karma
from graphswap.strategies.patrickstar import PatrickStar
from graphswap.strategies.swap_all import SwapAll
from graphswap.strategies.zero_offload import ZeroOffload

STRATEGIES: Mapping[str, Strategy] = {
    "auto": Auto(),
    "joint": Joint(),
    "greedy": Greedy(),
    "karma": Karma(),
    "checkmate": Checkmate(),
    "chen": Chen(),
    "swap_all": SwapAll(),
    "patrickstar": PatrickStar(),
    "zero_offload": ZeroOffload(),
}
