"""PyTorch's ways to save memory give the numbers of its plain step, on models of Keras's sizes."""

import pytest

torch = pytest.importorskip("torch", reason="needs graphswap[torch], which is gigabytes")

from graphswap.tools import gpu_bench, torch_peers  # noqa: E402

SIZES = {
    "gpt": {"blocks": 2, "width": 32, "heads": 2, "length": 16, "batch": 4},
    "resnet50": {"size": 32, "batch": 4},
}


@pytest.mark.parametrize("model", SIZES)
def test_every_way_gives_the_same_losses(model):
    plain, *others = (torch_peers.train(model, SIZES[model], way, 2, "cpu") for way in torch_peers.WAYS)
    assert len(set(plain.losses)) == len(plain.seconds) == 2
    assert plain.peak_bytes == 0  # a CPU counts nothing
    assert [other.losses for other in others] == [plain.losses] * 2


@pytest.mark.parametrize(("model", "weights"), [("gpt", 90984), ("resnet50", 23555082)])
def test_it_has_keras_s_weights(model, weights):
    """Those of `models.gpt(2, 32, 2, 16, 4)`, its places included, and of `models.resnet50(32, 4)`."""
    parts, _ = torch_peers.MODELS[model][0](**SIZES[model])
    assert sum(weight.numel() for part in parts for weight in part.parameters()) == weights


@pytest.mark.parametrize("way", ["torch.utils.checkpoint", "save_on_cpu"])
def test_less_is_kept_for_the_backward_pass(way):
    """Hooks around a step see what is kept; a way that works has hooks of its own for nearly all of it."""
    kept = {}
    for one in ("plain", way):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            torch_peers.train("gpt", {**SIZES["gpt"], "blocks": 8}, one, 1, "cpu")
        kept[one] = sum(sizes)
    assert kept[way] < kept["plain"] / 2


def test_it_runs_in_a_process_of_its_own():
    asked = {"model": "gpt", "sizes": SIZES["gpt"], "way": "plain", "steps": 2, "device": "cpu"}
    assert gpu_bench.elsewhere("torch_peers", asked).losses == torch_peers.train(**asked).losses
    assert gpu_bench.PEERS["torch"] == (tuple(SIZES), torch_peers.WAYS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    asked = {"model": "gpt", "sizes": SIZES["gpt"], "way": "plain", "steps": 2, "device": "cuda"}
    assert gpu_bench.elsewhere("torch_peers", asked).error == (
        "device: expected a GPU, PyTorch finds none. Install torch for CUDA, or name 'cpu'."
    )


def test_an_unknown_way_is_refused_rather_than_run_plainly():
    with pytest.raises(
        ValueError, match="way: expected one of plain, torch.utils.checkpoint, save_on_cpu, received 'no'"
    ):
        torch_peers.train("gpt", SIZES["gpt"], "no", 1, "cpu")
