"""The door to TensorFlow's graphs: FuncGraph to ir.Graph and back, and the hook at trace time.

Private TensorFlow used here (2.21): FuncGraph and its captures, `transform.FUNC_GRAPH_TRANSFORMS`,
`Operation._update_input` / `_add_control_inputs`, `Graph._get_function`, the graph importer, Grappler's Python
door, the options of function calls, the bridge to XLA and resource handle data. No other module but `profiler` uses
any.
"""

from graphswap.graphdef.bridge import compiled_hlo as compiled_hlo
from graphswap.graphdef.bridge import hlo as hlo
from graphswap.graphdef.captures import ResourceVariable as ResourceVariable
from graphswap.graphdef.captures import capture as capture
from graphswap.graphdef.captures import captured_values as captured_values
from graphswap.graphdef.captures import captured_variables as captured_variables
from graphswap.graphdef.captures import variables as variables
from graphswap.graphdef.captures import watch as watch
from graphswap.graphdef.definitions import called_definitions as called_definitions
from graphswap.graphdef.definitions import write_fingerprint as write_fingerprint
from graphswap.graphdef.exporting import as_planned as as_planned
from graphswap.graphdef.exporting import build_function as build_function
from graphswap.graphdef.exporting import export_function as export_function
from graphswap.graphdef.exporting import run_built as run_built
from graphswap.graphdef.grappler import Folding as Folding
from graphswap.graphdef.grappler import constant_folding as constant_folding
from graphswap.graphdef.grappler import planned_config as planned_config
from graphswap.graphdef.grappler import regroup as regroup
from graphswap.graphdef.grappler import run_trips_in_turn as run_trips_in_turn
from graphswap.graphdef.grappler import transpose_layout as transpose_layout
from graphswap.graphdef.grappler import without_memory_optimizer as without_memory_optimizer
from graphswap.graphdef.importing import import_function as import_function
from graphswap.graphdef.inlining import call_concrete as call_concrete
from graphswap.graphdef.inlining import call_inline as call_inline
from graphswap.graphdef.inlining import decidable_branches as decidable_branches
from graphswap.graphdef.inlining import has_calls as has_calls
from graphswap.graphdef.inlining import join_branches as join_branches
from graphswap.graphdef.inlining import take_branches as take_branches
from graphswap.graphdef.traced import OPAQUE as OPAQUE
from graphswap.graphdef.traced import FuncGraph as FuncGraph
from graphswap.graphdef.traced import Shape as Shape
from graphswap.graphdef.traced import UnsupportedGraphError as UnsupportedGraphError
from graphswap.graphdef.traced import arguments as arguments
from graphswap.graphdef.traced import group_size as group_size
from graphswap.graphdef.tracing import mark_current_graph as mark_current_graph
from graphswap.graphdef.tracing import off_traced as off_traced
from graphswap.graphdef.tracing import on_traced as on_traced
from graphswap.graphdef.tracing import traces_variables as traces_variables
