"""The examples' documented commands, really launched on two processes, with tiny budgets."""

import importlib.util
import inspect
import json
import re
import sys

import pytest

from tests.launch.launching import ON_TWO_PROCESSES, ROOT, run_to_end
from tests.methods.catalogue import CATALOGUE


def train(script, folder, *options, processes=2):
    """A short run that must go well; the output and the results it wrote."""
    launch = ON_TWO_PROCESSES if processes == 2 else [sys.executable]
    command = (*launch, f"examples/{script}.py", "--cpu", "--output_dir", folder, *options)
    code, output = run_to_end(*command, HF_HUB_OFFLINE="1")
    assert code == 0, output
    assert f"Processes: {processes} ({'MULTI_CPU' if processes == 2 else 'NO'})" in output
    assert (folder / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    return output, json.loads((folder / f"{script}.json").read_text())


def events(folder):
    """`{tag: [(step, value), …]}` from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for file in folder.rglob("events.out.tfevents.*"):  # hyperparameters have a file of their own
        accumulator = EventAccumulator(str(file)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            values.setdefault(tag, []).extend((event.step, event.value) for event in accumulator.Scalars(tag))
    return values


def assert_resumed(script, folder, options, steps=9, first=5):
    """Interrupted and gone on with, a run ends where the uninterrupted one does. Returns what the latter wrote."""
    output, whole = train(script, folder / "whole", *options, "--steps", steps)
    keep = ("--checkpoint_dir", folder / "checkpoints", "--save_every", 2)
    train(script, folder / "part", *options, "--steps", first, *keep)
    (folder / "checkpoints" / "partial").mkdir()  # what a run killed while saving leaves
    told, resumed = train(script, folder / "part", *options, "--steps", steps, *keep, "--resume")
    assert f"resumed after {first} steps" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    for name, run in whole["runs"].items():
        for what in {"weights", "metrics", "history"} & set(run):
            assert resumed["runs"][name][what] == run[what], what
    return output, whole


def test_finetune_text(tmp_path):
    """Micro-batches of two sentences often lack tags or ratings."""
    output, whole = assert_resumed("finetune_text", tmp_path, ("--batch_size", 2, "--accumulation", 2))
    run = whole["runs"]["gradnorm"]
    assert list(run["weights"]) == ["topic", "rating", "tags"]
    assert sum(run["weights"].values()) == pytest.approx(3)
    assert len(run["history"]) == 9
    assert re.search(r"^tags +F1 of tagged words +\d\.\d+ +\d\.\d+$", output, re.MULTILINE), output
    assert "losses weighted by GradNorm(); after 9 optimizer steps" in output
    logged = events(tmp_path / "whole")
    for step, values in run["history"]:
        assert dict(logged["weight/topic"])[step + 1] == pytest.approx(values["weight/topic"], rel=1e-6)
    assert {"loss/rating", "grad_norm/topic", "cosine/topic/rating", "test/tags"} <= set(logged)


def test_finetune_text_takes_a_model_and_a_data_set_from_folders_and_adapts_it_with_lora(tmp_path):
    from transformers import BertConfig, BertModel

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from text_data import make_tokenizer
    finally:
        sys.path.remove(str(ROOT / "examples"))

    rows = [
        {"words": ["Anna", "lives", "in", "Ghent"], "ner": [1, 0, 0, 2], "pos": ["N", "V", "P", "N"]},
        {"words": ["Nobody", "came"], "ner": [0, 0], "pos": ["P", "V"]},
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({**row, "length": len(row["words"])}) for row in rows * 20]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    make_tokenizer([row["words"] for row in rows], tmp_path / "model")
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "model")  # with its pooler, which no task trains
    columns = ("--text", "words", "--classification", "--regression", "length", "--tagging", "ner", "pos")
    options = ("--model", tmp_path / "model", "--dataset", tmp_path / "data", *columns, "--lora", "--batch_size", 4)
    output, results = train("finetune_text", tmp_path / "out", *options, "--steps", 3)
    assert list(results["runs"]["gradnorm"]["weights"]) == ["length", "ner", "pos"]
    assert re.search(r"trainable params: [\d,]+ \|\| all params", output)


def test_finetune_trainer(tmp_path):
    options = ("--batch_size", 2, "--accumulation", 2, "--save_every", 4)
    output, whole = train("finetune_trainer", tmp_path / "whole", *options, "--steps", 10)
    train("finetune_trainer", tmp_path / "part", *options, "--steps", 8)
    assert (tmp_path / "part" / "checkpoint-8" / "weighter.pt").exists()
    _, resumed = train("finetune_trainer", tmp_path / "part", *options, "--steps", 10, "--resume")
    assert resumed["runs"] == whole["runs"]
    assert len(whole["runs"]["gradnorm"]["history"]) == 10
    assert re.search(r"^topic +accuracy +\d\.\d+ +\d\.\d+$", output, re.MULTILINE), output
    assert "weight/topic" in output  # the Trainer's own log lines
    assert "train/weight/topic" in events(tmp_path / "whole" / "tensorboard")


@pytest.mark.parametrize(("options", "tasks"), [((), ["pairs", "scores"]), (("--together",), ["rank", "spread"])])
def test_finetune_embeddings(tmp_path, options, tasks):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    options = (*options, "--batch_size", 4, "--accumulation", 2, "--save_every", 4)
    output, whole = train("finetune_embeddings", tmp_path / "whole", *options, "--steps", 6)
    train("finetune_embeddings", tmp_path / "part", *options, "--steps", 4)
    assert (tmp_path / "part" / "checkpoint-4" / "weighter.pt").exists()
    _, resumed = train("finetune_embeddings", tmp_path / "part", *options, "--steps", 6, "--resume")
    run = whole["runs"]["gradnorm"]
    assert resumed["runs"] == whole["runs"]
    assert list(run["weights"]) == tasks and len(run["history"]) == 6
    assert max(abs(weight - 1) for weight in run["weights"].values()) > 1e-3
    assert re.search(r"^topic, accuracy of triplets +\d\.\d+$", output, re.MULTILINE), output
    assert (tmp_path / "whole" / "model" / "modules.json").exists()


def test_multi_loss_with_two_weighters(tmp_path):
    options = ("--adversarial", "--batch_size", 8, "--accumulation", 2)
    output, whole = assert_resumed("multi_loss", tmp_path, options)
    autoencoder, discriminator = whole["runs"]["balancer"], whole["runs"]["discriminator"]
    assert list(autoencoder["weights"]) == ["l1", "ssim", "edges", "latent", "adversarial"]
    assert list(discriminator["weights"]) == ["real", "fake"]
    for run in (autoencoder, discriminator):  # every loss reached its branch in every step
        assert all(f"grad_norm/{task}" in values for _, values in run["history"] for task in run["weights"])
    assert all(values["cosine/real/fake"] == 0 for _, values in discriminator["history"])  # they share no image
    assert "peak signal to noise" in output
    assert (tmp_path / "whole" / "multi_loss_digits.png").exists()


def test_autoencoder_gan(tmp_path):
    options = ("--batch_size", 8, "--accumulation", 2, "--adversarial_start", 3)
    output, whole = assert_resumed("autoencoder_gan", tmp_path, options)
    run = whole["runs"]["reference norm"]
    weights = [values for _, values in run["history"]]
    assert list(run["weights"]) == ["reconstruction", "perceptual", "adversarial"]
    assert [values["weight/reconstruction"] for values in weights] == [1] * 9
    assert len({values["weight/perceptual"] for values in weights}) == 9
    assert [values["weight/adversarial"] for values in weights[:3]] == pytest.approx([0.01] * 3)  # no adversary yet
    assert all(values["grad_norm/adversarial"] > 0 for values in weights[3:])
    assert len({values["weight/adversarial"] for values in weights[4:]}) == 5
    assert re.search(r"^perceptual +\d\S+ +\d\S+$", output, re.MULTILINE), output
    assert re.search(r"^commitment +\d\S+$", output, re.MULTILINE), output
    assert "peak signal to noise" in output and "No loss of" not in output
    assert (tmp_path / "whole" / "autoencoder_gan_images.png").read_bytes().startswith(b"\x89PNG")


def test_autoencoder_gan_is_the_same_however_the_batch_is_divided(tmp_path):
    """In float64, with an adversary and two optimizers: one process, and two with two micro-batches each."""
    options = ("--cpu", "--float64", "--batch_size", 8, "--steps", 8, "--adversarial_start", 2)
    found = {}
    for name, command in {"one": [sys.executable], "two": [*ON_TWO_PROCESSES]}.items():
        more = ("--accumulation", 2) if name == "two" else ()
        folder = tmp_path / name
        code, output = run_to_end(*command, "examples/autoencoder_gan.py", *options, *more, "--output_dir", folder)
        assert code == 0, output
        found[name] = json.loads((folder / "autoencoder_gan.json").read_text())["runs"]["reference norm"]
    one, two = found["one"], found["two"]
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["history"]) == len(two["history"]) == 8
    for (step, values), (other, others) in zip(one["history"], two["history"], strict=True):
        assert step == other and others == pytest.approx(values, rel=2e-7, abs=1e-7)  # recorded in float32
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9) and one["weights"]["adversarial"] != 0.01


def test_a_batch_of_autoencoder_gan_that_cannot_be_cut_evenly_is_refused(tmp_path):
    options = ("--cpu", "--batch_size", 9, "--accumulation", 2, "--output_dir", tmp_path)
    code, output = run_to_end(sys.executable, "examples/autoencoder_gan.py", *options)
    assert code == 1 and "--batch_size 9 cannot be cut into 1 processes × 2 micro-batches of one size." in output


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_preferences(tmp_path):
    options = ("--batch_size", 8, "--accumulation", 2, "--save_every", 4)
    output, whole = train("preferences", tmp_path / "whole", *options, "--steps", 8, "--compare", "static,cov")
    train("preferences", tmp_path / "part", *options, "--steps", 4)
    assert (tmp_path / "part" / "cov" / "checkpoint-4" / "weighter.pt").exists()
    _, resumed = train("preferences", tmp_path / "part", *options, "--steps", 8, "--resume")
    assert resumed["runs"]["cov"] == whole["runs"]["cov"]
    assert whole["runs"]["static"]["weights"] == {"sigmoid": 1, "sft": 1} != whole["runs"]["cov"]["weights"]
    assert len(whole["runs"]["cov"]["history"]) == 8
    assert re.search(r"^cov +\d\.\d+ +\d\.\d+ +\d\.\d+ +\d\.\d+$", output, re.MULTILINE), output


def on_two_and_on_one(script, folder, options, for_one=()):
    """The runs of a script on two processes and on one, and the output of the former."""
    output, two = train(script, folder / "two", *options)
    _, one = train(script, folder / "one", *options, *for_one, processes=1)
    assert list(two["runs"]) == list(one["runs"])
    for runs, processes in ((two["runs"], 2), (one["runs"], 1)):
        assert {run["processes"] for run in runs.values()} == {processes}
    return output, two["runs"], one["runs"]


def assert_alike(two, one, rel):
    """Numbers in nested dictionaries and lists."""
    if isinstance(one, dict):
        assert set(two) == set(one)
        two, one = [two[key] for key in one], list(one.values())
    if isinstance(one, list):
        assert len(two) == len(one)
        for mine, theirs in zip(two, one, strict=True):
            assert_alike(mine, theirs, rel)
    else:
        assert two == pytest.approx(one, rel=rel)


def test_pinn_on_two_processes_is_that_on_one(tmp_path):
    methods = ["1:100", "gradnorm", "reference", "relobralo"]
    options = ("--methods", ",".join(methods), "--seeds", "3", "--steps", 24, "--update_every", 4, "--float64")
    output, two, one = on_two_and_on_one("pinn", tmp_path, options)
    assert list(two) == [f"{method}, seed 3" for method in methods]
    for name, run in two.items():
        for what in ("errors", "weights", "history"):
            assert_alike(run[what], one[name][what], 1e-7)
        assert run["errors"][-1][0] == 24
        measured = {step for step, values in run["history"] if "grad_norm/boundary" in values}
        compares = run["method"] in ("gradnorm", "reference")
        assert bool(measured) == compares
        moved = run["weights"]["boundary"] != {"1:100": 100.0}.get(run["method"], 1.0)
        assert moved == (run["method"] != "1:100")
    assert two["gradnorm, seed 3"]["weights"]["boundary"] > 1  # second derivatives have the larger gradient
    assert re.search(r"^gradnorm +\d\.\d+ \(\d\.\d+ to \d\.\d+\) +\d", output, re.MULTILINE), output


def test_forces_on_two_processes_are_those_on_one(tmp_path):
    options = ("--methods", "10:1,gradnorm,uncertainty", "--seeds", "3", "--steps", 24, "--train_size", 64)
    output, two, one = on_two_and_on_one("forces", tmp_path, (*options, "--update_every", 4, "--float64"))
    for name, run in two.items():
        for what in ("errors", "weights", "history"):
            assert_alike(run[what], one[name][what], 1e-7)
    fixed, gradnorm, uncertainty = two.values()
    assert fixed["weights"] == {"energy": 10.0, "forces": 1.0}
    assert sum(gradnorm["weights"].values()) == pytest.approx(2) and gradnorm["weights"]["energy"] != 1
    assert {"grad_norm/energy", "grad_norm/forces"} <= set(gradnorm["history"][-4][1])
    assert not any("grad_norm/energy" in values for _, values in uncertainty["history"])  # one forward gave both
    deviation = float(re.search(r"standard deviations: .*, (\d+) meV/Å", output)[1])
    assert 300 < deviation < 1500
    assert all(run["errors"]["forces"] < deviation for run in two.values()), "no better than forces of 0"


def test_the_price_of_pinn_compares_with_no_weighter(tmp_path):
    code, output = run_to_end(
        sys.executable, "examples/pinn.py", "--cpu", "--price", 3, "--update_every", 2, "--output_dir", tmp_path
    )
    assert code == 0, output
    rows = re.findall(r"^(.*\S) +\d+\.\d\d +(\d\.\d{3}) \[", output, re.MULTILINE)
    assert [name for name, _ in rows] == ["no weighter", "equal", "gradnorm, every 2 steps", "gradnorm, every step"]
    assert rows[0][1] == "1.000" and all(0.3 < float(ratio) < 5 for _, ratio in rows)
    assert not list(tmp_path.iterdir()), "it trains nothing"


def test_finetune_domains_on_two_processes_is_two_micro_batches_on_one(tmp_path):
    options = ("--methods", "equal,gradnorm", "--seeds", "3", "--steps", 10, "--batch_size", 6)
    output, two, one = on_two_and_on_one("finetune_domains", tmp_path, options, ("--accumulation", 2))
    for name, run in two.items():
        for what in ("weights", "metrics", "evaluations"):
            assert_alike(run[what], one[name][what], 2e-3)  # float32
    equal, gradnorm = two.values()
    assert set(equal["weights"].values()) == {1.0}
    assert sum(gradnorm["weights"].values()) == pytest.approx(3)
    for step, values in gradnorm["history"]:
        others = dict(map(tuple, one["gradnorm, seed 3"]["history"]))[step]
        norms = {key: value for key, value in values.items() if key.startswith("grad_norm/")}
        assert norms == pytest.approx({key: others[key] for key in norms}, rel=2e-3)
        assert len(norms) >= 2  # sums are in one of ten texts, and not in every batch
    seen = [values for _, values in gradnorm["history"] if "grad_norm/sums" in values]
    assert seen and all(values["grad_norm/sums"] > values["grad_norm/tales"] for values in seen)
    assert gradnorm["weights"]["sums"] < 0.7 < gradnorm["weights"]["tales"]  # a mean over few tokens pulls most
    assert gradnorm["metrics"]["tales"] < gradnorm["evaluations"][0][1]["tales"] < 12
    assert re.search(r"^gradnorm +\d\.\d+ \(\d\.\d+ to \d\.\d+\) +\d", output, re.MULTILINE), output


SCRIPTS = ["autoencoder_gan", "finetune_text", "finetune_trainer", "finetune_embeddings", "multi_loss", "preferences"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_command_and_the_defaults(script):
    if library := {"finetune_embeddings": "sentence_transformers", "preferences": "trl"}.get(script):
        pytest.importorskip(library, reason=f"{library} is not installed")
    code, output = run_to_end(sys.executable, f"examples/{script}.py", "--help", COLUMNS="120")
    assert code == 0, output
    assert f"accelerate launch --config_file launch_configs/cpu_2.yaml examples/{script}.py --cpu" in output
    assert f"(default: runs/{script})" in output
    assert script == "autoencoder_gan" or "weighting method (default:" in output


@pytest.mark.parametrize("script", ["pinn", "forces", "finetune_domains"])
def test_help_of_a_comparison_shows_the_command_the_methods_and_the_defaults(script):
    code, output = run_to_end(sys.executable, f"examples/{script}.py", "--help", COLUMNS="120")
    assert code == 0, output
    assert f"accelerate launch --config_file launch_configs/cpu_2.yaml examples/{script}.py --cpu" in output
    assert f"(default: runs/{script})" in output
    methods = re.search(r"weighting methods to compare \(default:\s+(\S+)\)", output)[1].split(",")
    assert {"equal", "1:1"} & set(methods) and "gradnorm" in methods
    code, output = run_to_end(sys.executable, f"examples/{script}.py", "--methods", "gradnorm,gradnrom")
    assert code == 2 and "unknown ['gradnrom']" in output


def test_the_costs_have_a_row_for_every_method():
    """In the script's table and in the README's, but for wrappers and the adapter to TorchJD."""
    methods = {type(row.build(["a", "b"])) for row in CATALOGUE}
    own = {kind.__name__ for kind in methods if "method" not in inspect.signature(kind).parameters}
    own.discard("TorchJDWeighting")
    row = re.compile(r"^\| `(\w+)` \| \d+ \| \d+ \|$", re.MULTILINE)
    code, output = run_to_end(sys.executable, "examples/method_costs.py")
    assert code == 0, output
    assert set(row.findall(output)) == set(row.findall((ROOT / "examples" / "README.md").read_text())) == own


def test_the_sentences_are_what_their_script_makes(tmp_path):
    folder = ROOT / "examples" / "data"
    copy = tmp_path / "make_sentences.py"
    copy.write_text((folder / "make_sentences.py").read_text())
    code, output = run_to_end(sys.executable, copy)
    assert code == 0, output
    shipped = sorted((folder / "sentences").iterdir())
    assert [file.name for file in shipped] == ["test.jsonl", "train.jsonl"]
    assert sum(file.stat().st_size for file in shipped) < 300_000
    for file in shipped:
        assert file.read_bytes() == (tmp_path / "sentences" / file.name).read_bytes()
        for line in file.read_text().splitlines():
            row = json.loads(line)
            assert row["tags"] is None or len(row["tags"].split()) == len(row["text"].split())
            assert row["rating"] is None or 1 <= row["rating"] <= 5
