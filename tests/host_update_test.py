import dataclasses

import pytest
from testing import attrs_of, graph_of

