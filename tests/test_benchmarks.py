"""The benchmark, at tiny sizes: both sides compute the same, what is wrong is noticed, and the report is whole."""
from __future__ import annotations

import argparse
import json
import mmap
import shutil
from contextlib import contextmanager

import h5py
import pytest
import torch

import caption
from benchmarks import baseline, gpu, ours, run, tutorial
from benchmarks import setting as setting_module
from benchmarks.data import make_data
from benchmarks.proofs import ProofError, compare_captions, compare_files, compare_training
from benchmarks.setting import NAME, Setting, peak_bytes
from caption import Search, beam_search
from models import DecoderWithAttention

SMALL = ["--device", "cpu", "--precision", "float32", "--encoder", "resnet18", "--width", "32", "--vocabulary", "200",
         "--batch_size", "5", "5", "--pictures", "9", "--steps", "1", "--our_steps", "1", "--warm_up", "1",
         "--searched", "1", "--proof_pictures", "1"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    setting = run.make_setting(run.get_parser().parse_args(SMALL), tmp_path_factory.mktemp("benchmark"))
    make_data(setting)
    return setting


def test_the_data_are_like_coco(setting):
    sizes = [path.stat().st_size for path in setting.pictures_folder.iterdir()]
    lengths = torch.tensor([length - 2.0 for split in ("TRAIN", "VAL", "TEST") for length in
                            json.loads((setting.data / f"{split}_CAPLENS_{NAME}.json").read_text())])
    assert len(setting.word_map()) == setting.vocabulary
    assert 90_000 < min(sizes) and max(sizes) < 160_000
    assert lengths.min() >= 8 and 9.5 < lengths.mean() < 11.5


def test_a_training_step_is_the_same_and_a_wrong_one_is_noticed(setting, monkeypatch):
    theirs = baseline.training_proof(setting, 1)
    for kept in (False, True):
        found = compare_training(theirs, ours.training_proof(setting, 1, features_kept=kept), "float32")
        assert found["largest_difference"] <= 1e-5 and found["gradients"] >= 18
    own = ours.training_proof(setting, 1, "float64")
    found = compare_training(baseline.training_proof(setting, 1, "float64"), own, "float64")
    assert found["largest_difference"] <= 1e-6
    forward = tutorial.TutorialAttention.forward

    def wrong(self, encoder_out, decoder_hidden):
        context, alpha = forward(self, encoder_out, decoder_hidden)
        return 1.001 * context, alpha

    monkeypatch.setattr(tutorial.TutorialAttention, "forward", wrong)
    with pytest.raises(ProofError, match="differ by more than 1e-05"):
        compare_training(baseline.training_proof(setting, 1, "float64"), own, "float64")


def test_fine_tuning_is_the_same(setting):
    found = compare_training(*(side.training_proof(setting, 2, "float64") for side in (baseline, ours)), "float64")
    assert found["largest_difference"] <= 1e-6 and found["gradients"] > 60


def test_what_is_no_number_or_missing_is_noticed():
    numbers = {"loss": 1.0, "decoder.a": 1.0, "decoder.b": 1e-3}
    for dtype in ("float32", "float64"):
        with pytest.raises(ProofError, match="differ"):
            compare_training(numbers, numbers | {"decoder.a": float("nan")}, dtype)
        with pytest.raises(ProofError, match="other parameters"):
            compare_training(numbers, numbers | {"decoder.c": 1.0}, dtype)
    with pytest.raises(ProofError, match=r"decoder\.b"):
        compare_training(numbers, numbers | {"decoder.b": 2e-3}, "float64")


def test_captions_are_the_same(setting):
    pair = [side.evaluation_proof(setting) for side in (baseline, ours)]
    assert compare_captions(*pair)["mean_words"] >= 4
    with pytest.raises(ProofError, match="1 of 1 captions differ"):
        compare_captions(pair[0], [[*pair[1][0][:-2], 7, pair[1][0][-1]]])


@pytest.mark.parametrize("weights", ["decoder", "speaker"])  # the first never ends a caption
def test_searches_are_the_same(setting, weights):
    state = torch.load(setting.weights_path, weights_only=True)
    word_map = setting.word_map()
    decoders = [kind(**setting.decoder_arguments(state["encoder_dim"])).eval()
                for kind in (tutorial.TutorialDecoder, DecoderWithAttention)]
    for decoder in decoders:
        decoder.load_state_dict(state[weights])
    features = torch.randn(4, 3, 3, state["encoder_dim"], generator=torch.Generator().manual_seed(0))
    theirs = [tutorial.search(lambda image: image, decoders[0], each.unsqueeze(0), word_map, 5) for each in features]
    own = [best for best, in beam_search(decoders[1], features, word_map, Search(5, forbidden=()))]
    assert [each.sequence for each in own] == theirs
    assert {each.finished for each in own} == {weights == "speaker"}


def test_cold_captions_are_the_same(setting, capsys):
    picture = setting.pictures_folder / "000000.jpg"
    theirs = tutorial.main(argparse.Namespace(
        caption=[picture, baseline.save_checkpoint(setting)], word_map=setting.data / f"WORDMAP_{NAME}.json",
        beam_size=5, device="cpu"))
    own = caption.main(caption.get_parser().parse_args(
        ["--img", str(picture), "--model", str(ours.save_checkpoint(setting)), "--device", "cpu"]))
    assert theirs == own[0]["captions"][0]["caption"] != ""
    assert theirs in capsys.readouterr().out


def test_prepared_files_are_the_same(setting, tmp_path):
    baseline.prepare(setting, tmp_path / "theirs")
    assert compare_files(tmp_path / "theirs", setting.data) == {"files": 10, "pictures": 9}
    with h5py.File(tmp_path / "theirs" / f"VAL_IMAGES_{NAME}.hdf5", "a") as file:
        file["images"][1, 2, 100, 100] ^= 1
    with pytest.raises(ProofError, match="picture 1 of VAL_IMAGES"):
        compare_files(tmp_path / "theirs", setting.data)
    lengths = tmp_path / "theirs" / f"TEST_CAPLENS_{NAME}.json"
    lengths.write_text(lengths.read_text().replace("[", "[1, "))
    with pytest.raises(ProofError, match="TEST_CAPLENS"):
        compare_files(tmp_path / "theirs", setting.data)


def test_the_report_is_whole(setting, monkeypatch, tmp_path, capsys):
    """The loops of the benchmark on data that are there already, in this process: a fresh one takes seconds."""
    @contextmanager
    def no_processes():
        yield lambda side, function, *arguments: run.call(side, function, arguments)

    monkeypatch.setattr(run, "two_processes", no_processes)
    monkeypatch.setattr(run, "make_data", lambda own: shutil.copytree(setting.folder, own.folder, dirs_exist_ok=True))
    path = tmp_path / "report.json"
    run.main(run.get_parser().parse_args([*SMALL, "--only", "stage1", "preparation", "--rounds", "1", "--json",
                                          str(path)]))
    report = json.loads(path.read_text())
    assert set(report["ratios"]) == {"stage1_features_kept", "stage1", "stage2", "evaluation", "preparation", "memory",
                                     "cold_caption"}
    assert {work for work, ratio in report["ratios"].items() if ratio is not None} == {"stage1", "preparation"}
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["cores"] > 0
    figure = report["figures"]["stage1"]
    assert figure["ratio"] == pytest.approx(figure["ours"] / figure["baseline"]) and figure["unit"] == "captions/s"
    assert report["proofs"]["preparation"]["pictures"] == 9 and report["proofs"]["stage1_float32"]["loss"] > 0
    printed = capsys.readouterr().out
    assert "stage1: training on a frozen encoder" in printed and "Of that, ours reaches: " in printed
    assert len(report["flop_rates"]) == 4 and min(report["flop_rates"].values()) > 0


def test_operations_are_counted_where_they_are_known():
    """A layer of 200 x 300 numbers, 10 rows: 2 x 10 x 200 x 300 operations forward, and the same twice backward."""
    layer, rows, clock = torch.nn.Linear(200, 300), torch.randn(10, 200, requires_grad=True), iter([5.0, 7.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting_module, "now", lambda _: next(clock))
        assert setting_module.flop_rate(lambda: layer(rows).sum().backward(), 1, 4, "cpu") == 4 * 3 * 1_200_000 / 2
    assert "reaches: 50% (a), 25% (b)" in run.shares({"matrix product": 2e12, "a": 1e12, "b": 5e11}, "float32")


def test_figures_are_medians_and_the_ratio_is_the_median_of_ratios():
    figures = run.figures_of("memory", [[1.0, 0.5], [2.0, 0.2], [4.0, 1.2]], "what was counted")
    assert (figures["baseline"], figures["ours"], figures["ratio"]) == (2.0, 0.5, pytest.approx(0.3))
    assert "| memory | 2" in run.table({"memory": figures}) and "memory: what was counted" in run.table(
        {"memory": figures})


def test_peak_memory_is_that_of_the_work():
    def touch() -> None:
        with mmap.mmap(-1, 64_000_000) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1

    assert 60e6 < peak_bytes(touch, "cpu") < 80e6


def test_the_gpus_benchmark_runs_dry_and_makes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", {name: (stage, kept, 10) for name, (stage, kept, _) in gpu.STEPS.items()})
    monkeypatch.setattr(gpu, "SEARCHED", (2, 3))
    monkeypatch.setattr(gpu, "MEASURED", ("bfloat16",))  # a CPU takes long in float16
    path = tmp_path / "gpu.json"
    report = gpu.main(gpu.get_parser().parse_args(["--tiny", "--device", "cpu", "--json", str(path)]))
    assert json.loads(path.read_text()) == report
    assert report["gradients"] < 1e-9
    table = capsys.readouterr().out
    for name in gpu.STEPS:
        figures = report["bfloat16"][name]
        assert figures["captions/s"] == pytest.approx(10 / figures["ms"] * 1e3)
        assert 0 < figures["host ms"] <= figures["ms"]
        assert f"| {name} | bfloat16 | {figures['captions/s']:.4g} |" in table
