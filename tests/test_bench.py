"""The benches' own promises: nothing wrong is timed, nothing dropped, nothing measured lost."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fastres import train

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import compare  # noqa: E402
import keep_run  # noqa: E402
import layers  # noqa: E402
import memory  # noqa: E402
import rivals  # noqa: E402
import seeds  # noqa: E402
import suites  # noqa: E402
import table  # noqa: E402
import workloads  # noqa: E402
from harness import (  # noqa: E402
    Judge,
    NotInstalledError,
    Race,
    Runner,
    interleaved,
    relative_error,
)

from cases import Conv  # noqa: E402
from tiny_runs import fit, metrics, use_tiny  # noqa: E402

EXACT = torch.arange(1.0, 9.0, dtype=torch.float64)


def runner(value):
    return Runner(lambda: None, lambda: {"output": value})


def missing():
    raise NotInstalledError("nothing is installed")


def broken():
    raise RuntimeError("out of order\nand more")


def race(**entrants):
    standard = {
        "fastres": lambda: runner(EXACT.float()),
        "torch eager": lambda: runner(EXACT.float() * (1 + 1e-6)),
    }
    return Race("test", "a-case", standard | entrants, lambda: {"output": EXACT}, 1e-6, images=2)


def run(a_race):
    return compare.run_race(a_race, 3, True, lambda text: None, lambda name: None)[0]


def test_only_right_answers_are_timed_and_the_rest_is_listed():
    wrong = EXACT.clone()
    wrong[3] += 0.01
    entrants = {
        "wrong": lambda: runner(wrong),
        "not finite": lambda: runner(EXACT * float("nan")),
        "other shape": lambda: runner(EXACT[None]),
        "missing": missing,
        "broken": broken,
    }
    record = run(race(**entrants))
    assert set(record["times"]) == {"fastres", "torch eager"}
    assert record["fastres"] == "fastres"
    assert record["best_rival"] == "torch eager"
    assert record["ratio"] == record["times"]["torch eager"] / record["times"]["fastres"]
    failed = record["failed"]
    assert failed["missing"] == "not installed"
    assert failed["broken"] == "RuntimeError: out of order"
    assert failed["wrong"].startswith("WrongAnswerError: relative error 0.0007")
    assert set(failed) == set(entrants)


def test_a_wrong_fastres_gets_no_ratio():
    record = run(race(fastres=lambda: runner(EXACT + 1)))
    assert record["ratio"] is None
    assert record["ratio_eager"] is None
    assert "fastres" in record["failed"]


def test_relative_error_is_the_worst_of_all_names():
    exact = {"a": torch.ones(4), "b": torch.full((4,), 10.0)}
    actual = {"a": torch.ones(4), "b": torch.full((4,), 11.0)}
    assert relative_error(actual, exact) == pytest.approx(0.1)


def test_every_contestant_is_timed_in_every_round_in_turn():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(runs, rounds=3, least_seconds=0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[6:] == list("abc" + "bca" + "cab")


def test_an_interrupted_run_keeps_what_is_complete(monkeypatch, tmp_path, capsys):
    def suite(options):
        def interrupt():
            raise KeyboardInterrupt

        yield "first", race
        yield "second", interrupt

    monkeypatch.setitem(compare.SUITES, "data", suite)
    path = tmp_path / "records.json"
    assert compare.main(["data", "--quick", "--json", str(path)]) == 130
    (record,) = json.loads(path.read_text())
    assert record["case"] == "a-case"
    assert {"device", "threads", "versions", "commit", "date", "verified"} <= set(record)
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_a_gpu_suite_without_a_gpu_says_so(capsys):
    assert compare.main(["gpu-infer", "gpu-train", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "gpu-infer: skipped" in out
    assert "gpu-train: skipped" in out


def test_memory_counts_what_autograd_keeps_and_what_is_held():
    x = torch.randn(1000, requires_grad=True)

    def step():
        # exp keeps its result, sin keeps its input: the same storage, counted once.
        x.exp().sin().sum().backward()
        x.grad = None

    assert memory.kept_bytes(step, [x]) == 4000
    assert memory.peak_bytes(step, "cpu") >= 8000


def test_tables_come_from_the_json_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    record = run(race())
    record |= {"device": "a CPU", "threads": 2, "versions": {"torch": "2.15"}, "commit": "c" * 40}
    record |= {"date": "2026-01-01T00:00:00+00:00"}
    record["times"] = {"fastres": 0.001, "torch eager": 0.002}
    record["ratio"] = record["ratio_eager"] = 2.0
    (tmp_path / "a.json").write_text(json.dumps([record]))
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench a.json test -->\nold\n<!-- /bench -->\nafter\n")
    assert table.main(["--check", str(document)]) == 1
    assert table.main(["--update", str(document)]) == 0
    assert table.main(["--check", str(document)]) == 0
    text = document.read_text()
    assert "| a-case | 1 ms | 2 ms | 2 ms (torch eager) | 2.00 | 2.00 |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileNotFoundError):
        table.main(["--check", str(document)])


def test_accuracies_of_seeds_are_compared_in_pairs():
    # Textbook values: t of 4 degrees reaches 0.975 at 2.776, of 30 at 2.042.
    assert seeds.student_quantile(0.975, 4) == pytest.approx(2.776, abs=1e-3)
    assert seeds.student_quantile(0.975, 30) == pytest.approx(2.042, abs=1e-3)
    plain = torch.tensor([0.30, 0.40, 0.50, 0.35, 0.45], dtype=torch.float64)
    noise = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0], dtype=torch.float64) / 100
    same = seeds.compare(plain, plain + noise)
    assert same["same"]
    assert same["difference"] == pytest.approx(0)
    assert same["interval_high"] == pytest.approx(2.776 * (2.5e-4 / 5) ** 0.5, rel=1e-3)
    worse = seeds.compare(plain, plain + noise - 0.03)  # within one deviation of the seeds
    assert not worse["same"]
    assert worse["interval_high"] < 0
    runs = [
        {"accuracy": {seeds.PLAIN: a.item(), seeds.FUSED: b.item()}, "gaps": seeds.gaps(losses)}
        for a, b in zip(plain, plain + noise - 0.03, strict=True)
        for losses in [{form: [2.0, 1.5] for form in seeds.FORMS}]
    ]
    text = table.markdown([seeds.record(train.TrainConfig(), runs)], "seeds")
    assert "| 2 to 10 | 0.0e+00 | 0.0e+00 |" in text
    assert "plain 40.0% ± 7.9%, fused 37.0%" in text
    assert "the mean difference, -3.0 points, is significantly different from zero" in text
    assert "less than 2.0 points would not show in 5 seeds" in text
    runs[0]["gaps"][seeds.FUSED] = [0.3, 0.1]
    runs[0]["gaps"][seeds.OTHER_LAYOUT] = [0.1, 0.0]
    text = table.markdown([seeds.record(train.TrainConfig(), runs)], "seeds")
    assert "Fused is at most 3.0 times as far from plain as plain's other layout is." in text


def test_gaps_of_losses_are_relative_and_the_largest_of_all_seeds():
    plain = [2.0] * 60
    runs = [
        {"gaps": seeds.gaps({seeds.PLAIN: plain, seeds.FUSED: fused, seeds.OTHER_LAYOUT: plain})}
        for fused in ([2.0] + [2.2] * 59, [2.0] * 30 + [1.0] * 30)
    ]
    lines = {tuple(line["steps"]): line for line in seeds.largest_gaps(runs)}
    assert lines[1, 1][seeds.FUSED] == 0
    assert lines[2, 10][seeds.FUSED] == pytest.approx(0.1)
    assert lines[21, 50][seeds.FUSED] == pytest.approx(0.5)
    assert all(line[seeds.OTHER_LAYOUT] == 0 for line in lines.values())


def test_a_run_is_kept_with_its_circumstances_and_becomes_a_table(monkeypatch, tmp_path, capsys):
    use_tiny(monkeypatch)
    result = fit(tmp_path / "run", epochs=2)
    kept = tmp_path / "kept"
    words = [str(tmp_path / "run"), "--into", str(kept), "--commit", "a" * 40]
    keep_run.main([*words, "--note", "beside other work"])
    names = "config.json confusion.png curves.png metrics.csv record.json"
    assert sorted(path.name for path in kept.iterdir()) == names.split()
    assert str(tmp_path) not in "".join(p.read_text() for p in kept.glob("*.json"))
    assert json.loads((kept / "config.json").read_text())["recipe"] == "standard"
    (record,) = json.loads((kept / "record.json").read_text())
    assert record["result"]["test_accuracy"] == result.test_accuracy
    assert record["commit"] == "a" * 40
    assert {"torch", "fastres"} <= record["versions"].keys()
    text = table.markdown([record], "run")
    assert f"| **{result.test_accuracy:.2%}** |" in text
    speeds = sorted(line["images_per_second"] for line in metrics(tmp_path / "run"))
    assert f"| standard, resnet18, sample, amp none | 2 | {speeds[1]:.0f} |" in text
    assert "beside other work" in text and "commit aaaaaaaa" in text
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(SystemExit, match="not finished"):
        keep_run.main(words)


def test_a_bf16_case_is_judged_as_bf16():
    case = dataclasses.replace(workloads.QUICK, bf16=True)
    judge = Judge(suites.training_race("cpu-train", case))
    assert judge.race.case.endswith("-bf16")
    for name in ("torch eager", "fastres"):
        judge.admit(name)
        assert 1e-4 < judge.errors[name] < 0.1  # not float32's error


def test_ncnn_and_mnn_run_in_races_of_batch_1_alone():
    for n, enters in ((1, True), (2, False)):
        names = rivals.cpu_inference(torch.nn.ReLU(), [torch.zeros(n, 3, 4, 4)])
        assert ("ncnn" in names, "MNN" in names) == (enters, enters)


@pytest.mark.parametrize("name", ["ncnn", "MNN"])
def test_a_rival_of_two_inputs_gives_the_right_answer(name):
    judge = Judge(suites.conv_bn_relu_race(Conv("tiny", 16, 16, 3, 1, 8, n=1), True, "cpu"))
    judge.admit("torch eager")
    try:
        runner = judge.admit(name)
    except NotInstalledError as error:
        pytest.skip(str(error))
    runner.run()
    assert relative_error(runner.answer(), judge.exact) == judge.errors[name]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_layers_have_all_flops_of_the_model(training):
    model = workloads.torchvision_model(workloads.QUICK).train(training)
    images, labels = workloads.batch(workloads.QUICK)
    ours = workloads.fastres_model(workloads.QUICK, model)
    if training:
        runner = rivals.training_step(ours, images, labels)
    else:
        runner = rivals.eager(ours, [images])
    runner.run()
    lines = layers.by_kind(layers.profile(runner.run, 1), {"float32 FLOP/s": 1e9, "copy B/s": 1e9})
    flops = sum(line.get("flops", 0) for line in lines)
    assert flops == workloads.model_flops(model, images, training)
    calls = {line["kind"]: line["calls"] for line in lines}
    forward = {"stem": 1, "3x3": 5, "3x3 stride 2": 3, "1x1 stride 2": 3}
    forward |= {"pool": 1, "fc": 1} if training else {"pool + fc": 1}
    assert forward.items() <= calls.items()
    if training:
        norms = "BatchNorm + add + ReLU"
        # All but the last stage's are computed again in the backward.
        backward = {"stem backward": 1, "3x3 backward": 5, norms: 5 + 4, f"{norms} backward": 5}
        assert {**backward, "optimizer": 1}.items() <= calls.items()
    assert lines[-1]["kind"] == "rest"


def test_layers_count_the_fewest_bytes():
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    weight, ones = torch.randn(4, 8, 1, 1), torch.ones(4)

    def run(stride, packed):
        bn = (ones, ones, ones, ones, 1e-5)
        geometry = ([stride, stride], [0, 0], [1, 1], 1)
        torch.ops.fastres.conv_bn_relu(x, weight, None, *bn, None, *geometry, True, packed)

    for stride, packed in ((1, None), (1, torch.empty(0)), (2, None)):
        (call,) = layers.profile(lambda s=stride, p=packed: run(s, p), 1).calls
        positions = (6 // stride) ** 2
        assert call.kind == ("1x1" if stride == 1 else "1x1 stride 2")
        assert call.flops == 2 * positions * 8 * 4
        # A stride of 2 reads one position in four.
        assert call.nbytes == 4 * (positions * 8 + positions * 4 + 8 * 4 + 4 * 4)


PEAKS = {"float32 FLOP/s": 1e9, "copy B/s": 1e8}


def profile_of_two_kinds():
    calls = [
        layers.Call("3x3", 10**6, 10),
        layers.Call("3x3", 10, 10**6),
        layers.Call("pool", 0, 100),
    ]
    return layers.Profile(0.1, {"3x3": 0.022, "pool": 0.05}, calls)


def test_the_roofline_is_of_every_call_by_itself():
    conv, pool, rest = layers.by_kind(profile_of_two_kinds(), PEAKS)
    # One call by its FLOPs, the other by its bytes.
    assert conv["roofline"] == pytest.approx(1e-3 + 1e-2)
    assert conv["distance"] == pytest.approx(2)
    assert conv["calls"] == 2
    assert conv["share"] == pytest.approx(0.22)
    assert pool["distance"] == pytest.approx(5e4)
    assert rest["seconds"] == pytest.approx(0.028)
    assert layers.cells(conv) == ["3x3", "2", "22.00 ms", "22%", "0", "1.0", "11.00 ms", "2.00"]
    assert len(layers.cells(rest)) == len(layers.HEADINGS)
    assert "most to gain: pool, 50.00 ms" in layers.verdict([conv, pool, rest], PEAKS)


def test_a_roofline_of_one_case_in_a_document():
    record = run(race()) | {"peaks": PEAKS, "layers": layers.by_kind(profile_of_two_kinds(), PEAKS)}
    record |= {
        "device": "a CPU",
        "threads": 2,
        "versions": {},
        "commit": None,
        "date": "2026-01-01",
    }
    text = table.markdown([record, record | {"case": "another"}], "roofline:a-case")
    assert text.startswith("a-case:\n")
    assert "| 3x3 | 2 | 22.00 ms | 22% |" in text
    assert "another" not in text
    with pytest.raises(ValueError, match="no layers"):
        table.markdown([run(race())], "roofline")


@pytest.mark.parametrize("name", ["README.md", "bench/README.md", "docs/benchmarks.md"])
def test_the_documents_tables_are_up_to_date(name):
    text = (BENCH.parent / name).read_text()
    assert table.filled(text) == text
