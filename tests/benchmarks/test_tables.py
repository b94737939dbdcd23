"""What the benchmarks print: ratios the right way round, medians, and nothing for what was not measured."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import convert, decode, peers, table
from benchmarks.convert import RECIPES, WORKS, Figures, Work
from benchmarks.decode import PAIRS, Compared, compare
from benchmarks.measure import CommandError, Cost, copy_cost, middle, run
from benchmarks.peers import Installed, MissingError, Peer
from tundish.recipe import load_recipe

GB = 10**9
ROOT = Path(__file__).parents[2]


def test_columns_line_up():
    text = table.show("title", ["name", "s"], [["a", "1.0"], ["longer", "10.0"]])
    assert text.splitlines() == ["title", "", "name       s", "------  ----", "a        1.0", "longer  10.0"]


def test_a_row_has_medians_the_largest_memory_and_ratios_round_by_round():
    one, two = Peer("one", lambda *_: [], ""), Peer("two", lambda *_: [], "")
    work = Work("w", "int4", (), (one, two))
    figures = Figures(
        ours=[Cost(10, GB), Cost(20, 2 * GB), Cost(12, GB)],
        copies=[Cost(5, 0), Cost(5, 0), Cost(6, 0)],
        artifacts=3 * GB,
        peers={"one": [Cost(30, 4 * GB), Cost(30, 4 * GB), Cost(30, 4 * GB)], "two": [Cost(10, GB)] * 3},
    )
    assert convert.table_row(work, figures) == ["w", "12.0", "2.00", "3.00", "2.00x", "40.0", "4.00", "3.33x"]


def test_a_peer_that_did_not_run_leaves_dashes_and_a_line():
    work = Work("w", "int4", (), (peers.Q4_0, peers.MLX))
    figures = Figures([Cost(10, GB)], [Cost(5, 0)], GB, {peers.Q4_0.name: [Cost(1, GB)]}, {peers.MLX.name: "not there"})
    assert convert.table_row(work, figures)[-3:] == [table.NONE] * 3
    said = convert.report([work], {"w": figures})
    assert f"{peers.MLX.name}: not there" in said
    assert f"{peers.Q4_0.name}: 1.0 s, 1.00 GB" in said


def test_costs_add_up_in_time_and_not_in_memory():
    assert Cost(1, 5) + Cost(2, 3) == Cost(3, 5)
    assert middle([Cost(1, 5), Cost(9, 7), Cost(2, 6)]) == Cost(2, 7)


MEASURE = """
import sys
from benchmarks.measure import run
print(run([sys.executable, "-c", sys.argv[1]]).memory)
"""


def test_a_command_is_measured_with_the_memory_it_took(monkeypatch):
    monkeypatch.chdir(ROOT)

    def memory(code: str) -> int:
        """Asked of a small process, as a child's peak starts from its parent's size."""
        command = [sys.executable, "-c", MEASURE, code]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    small, large = memory("pass"), memory("b'x' * 200_000_000")
    assert small < 60_000_000
    assert 195_000_000 < large - small < 210_000_000


def test_openblas_settings_of_the_machine_do_not_reach_children(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    run([sys.executable, "-c", "import os, sys; sys.exit('OPENBLAS_CORETYPE' in os.environ)"])


def test_a_command_that_fails_tells_its_last_words():
    with pytest.raises(CommandError, match="status 3: the end"):
        run([sys.executable, "-c", "print('the end'); raise SystemExit(3)"])
    with pytest.raises(CommandError, match="killed by signal 9"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


def test_copying_reads_and_writes_everything_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "file").write_bytes(bytes(20 << 20))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(1 << 20))
    assert copy_cost(checkpoint, tmp_path / "out", tmp_path / "copy").seconds > 0
    assert not (tmp_path / "copy").exists()


def test_what_is_not_installed_is_said_and_not_run(tmp_path):
    nowhere = Installed((Path(sys.executable),), None)
    figures = Figures()
    nothing = Peer("p", lambda found, *_: [[found.python("no_such_module_here")]], "")
    convert.measure_peer(nothing, nowhere, tmp_path, tmp_path, figures)
    assert figures.why == {"p": "not installed (no no_such_module_here)"}
    with pytest.raises(MissingError, match="convert_hf_to_gguf"):
        nowhere.converter()


def test_only_what_is_missing_is_named():
    nowhere = Installed((Path(sys.executable),), None)
    with pytest.raises(MissingError, match=r"^no no_such_module_here, nor_this$"):
        nowhere.python("json", "no_such_module_here", "os.path", "nor_this")
    assert nowhere.python("json", "os.path") == Path(sys.executable)
    with pytest.raises(MissingError, match=r"^no json$"):
        Installed((), None).python("json")


def test_a_peer_runs_its_commands_in_a_new_folder_and_counts_them_together(tmp_path):
    write = [sys.executable, "-c", "open('part', 'a').write('x')"]
    peer = Peer("p", lambda *_: [list(write), list(write)], "part")
    cost = peer.convert(Installed((), None), tmp_path, tmp_path / "new")
    assert (tmp_path / "new" / "part").read_text() == "xx"
    assert cost.seconds > 0


def test_decoding_takes_turns_and_above_one_means_ours_is_faster():
    order: list[str] = []

    def asked(name: str, times: Iterator[list[float]]) -> decode.Ask:
        def ask() -> list[float]:
            order.append(name)
            return next(times)

        return ask

    ours = asked("ours", iter([[1.0, 9.0, 1.0], [2.0], [4.0]]))
    peer = asked("peer", iter([[2.0], [3.0, 3.0, 8.0], [4.0]]))
    found = Compared([], [])
    compare(ours, peer, 3, found)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert found == Compared([1.0, 2.0, 4.0], [2.0, 3.0, 4.0])
    assert found.ratio == 1.5
    assert decode.table_row(PAIRS["onnx"], found)[1:] == ["2000.00", "3000.00", "1.50x", "1.25 to 1.75"]
    assert decode.table_row(PAIRS["onnx"], "gone")[1:] == [table.NONE] * 4


def test_a_worker_that_dies_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(CommandError, match="ended with status"), decode.worker("onnx", tmp_path / "none", 1, 1):
        pass


@pytest.mark.parametrize(
    "recipe", sorted({work.recipe for work in WORKS.values()} | {p.recipe for p in PAIRS.values()})
)
def test_every_recipe_that_is_named_loads_and_has_its_targets(recipe):
    loaded = load_recipe(RECIPES / f"{recipe}.yaml")
    wanted = {target for work in WORKS.values() if work.recipe == recipe for target in work.targets}
    wanted |= {pair.runtime for pair in PAIRS.values() if pair.recipe == recipe}
    assert wanted <= {target.value for target in loaded.targets}


def test_no_recipe_lies_about_unused():
    used = {work.recipe for work in WORKS.values()} | {pair.recipe for pair in PAIRS.values()}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == used
