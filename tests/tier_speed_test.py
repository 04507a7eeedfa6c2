"""The tool that measures the far tiers prints shares of memcpy and dd, and says what it does not understand."""

import json
import os
import subprocess
import sys

import pytest

from graphswap.tools import tier_speed


def test_it_measures_each_way_beside_its_reference(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "graphswap.tools.tier_speed", "--values=1", "--rounds=2"]
    command += [f"--directory={tmp_path}", f"--out={tmp_path / 'speed.json'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["bytes"] == 64 << 20
    assert set(tier_speed.REFERENCES) | {"memcpy", "dd write", "dd read"} == set(found["seconds"])
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert tier_speed.table(found["bytes"], found["seconds"]) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_the_table_holds_medians_against_references():
    seconds = {"memcpy": [1.0, 3.0, 2.0], "host out": [4.0], "dd write": [1.0], "disk out": [2.0]}
    assert tier_speed.table(4 * 10**9, seconds).splitlines() == [
        "| way      | GB/s | range        | share           |",
        "| -------- | ---- | ------------ | --------------- |",
        "| memcpy   | 2.00 | 1.33 to 4.00 |                 |",
        "| host out | 1.00 | 1.00 to 1.00 | 50% of memcpy   |",
        "| dd write | 4.00 | 4.00 to 4.00 |                 |",
        "| disk out | 2.00 | 2.00 to 2.00 | 50% of dd write |",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--directory=/nowhere", "tier_speed: --directory: expected one that exists, received '/nowhere'."),
        ("--rounds=0", "tier_speed: flag --rounds=0"),
        ("more", "tier_speed: expected flags, received more."),
    ],
)
def test_what_it_does_not_understand_is_refused(argument, message):
    with pytest.raises(SystemExit, match=message):
        tier_speed.main(["tier_speed", argument])
