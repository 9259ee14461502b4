"""TRL's trainers with their losses weighed, against TRL's own and loops by hand; its metrics and checkpoints stay.

The models are tiny and random, the tokenizer is built by hand. Functions without `test` in their names run inside the
processes, many in one launch, since importing TRL takes a while.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, StaticWeighting, Weighter
from tests.distributed.setups import error_of
from tests.ranks import forget_accelerators, run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

VOCABULARY = 32
LOSSES = ["sigmoid", "sft"]
STATIC = {"sigmoid": 0.7, "sft": 0.3}
COV = CoVWeighting(decay=0.9)
ROUNDING = 1e-6  # TRL's heads compute log-probabilities in float32


# ---- models and data -------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(VOCABULARY - 3))]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    found = PreTrainedTokenizerFast(tokenizer_object=built, **special)
    found.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return found


def model(experts: bool = False, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if not experts:
        return LlamaForCausalLM(LlamaConfig(**sizes)).double()
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, router_aux_loss_coef=0.02, output_router_logits=True)
    config._experts_implementation = "eager"  # the only one for float64
    return MixtralForCausalLM(config).double()


def text(generator: torch.Generator, words: int) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(VOCABULARY - 3, (words,), generator=generator))


def pairs(ragged: bool = True) -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    lengths = [(3 + i % 5, 2 + i % 7) if ragged else (4, 6) for i in range(16)]
    rows = [{"prompt": text(g, 4), "chosen": " " + text(g, a), "rejected": " " + text(g, b)} for a, b in lengths]
    return Dataset.from_list(rows)


def texts() -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    return Dataset.from_list([{"text": text(g, 3 + (5 * i) % 11)} for i in range(16)])


def talks() -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    rows = [
        [{"role": role, "content": text(g, n)} for role, n in (("user", 3), ("assistant", 2 + i % 6))]
        for i in range(16)
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


# ---- trainers --------------------------------------------------------------------------------------------------------


def arguments(kind: Any, folder: Any, accumulation: int = 2, **options: Any) -> Any:
    rows = 8 // accumulation // int(os.environ.get("WORLD_SIZE", "1"))  # 8 rows make a step on any number of processes
    forget_accelerators()
    given = {
        "max_steps": 4,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        **options,
    }
    return kind(str(folder), **given)


def in_order(cls: Any) -> Any:
    """Its rows come in their order, whatever the seed and the number of processes."""
    from torch.utils.data import SequentialSampler

    return type(cls.__name__, (cls,), {"_get_train_sampler": lambda self, *args: SequentialSampler(self.train_dataset)})


def dpo(folder: Any, cls: Any = None, ragged: bool = True, settings: Any = None, **weighting: Any) -> Any:
    from trl import DPOConfig

    from accel_weighting.integrations.trl import WeightedDPOTrainer

    policy = model()
    return in_order(cls or WeightedDPOTrainer)(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=arguments(DPOConfig, folder, **{"loss_type": LOSSES, **(settings or {})}),
        train_dataset=pairs(ragged),
        eval_dataset=pairs(ragged),
        processing_class=tokenizer(),
        **weighting,
    )


def sft(folder: Any, cls: Any = None, experts: bool = True, settings: Any = None, **weighting: Any) -> Any:
    from trl import SFTConfig

    from accel_weighting.integrations.trl import WeightedSFTTrainer

    return in_order(cls or WeightedSFTTrainer)(
        model=model(experts),
        args=arguments(SFTConfig, folder, **(settings or {})),
        train_dataset=texts(),
        processing_class=tokenizer(),
        **weighting,
    )


def gkd(folder: Any, own: bool = False, settings: Any = None, **weighting: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from accel_weighting.integrations.trl import GKDWeightingMixin

    class Weighted(GKDWeightingMixin, GKDTrainer):
        pass

    return in_order(GKDTrainer if own else Weighted)(
        model=model(),
        teacher_model=model(seed=1),
        args=arguments(GKDConfig, folder, **{"lmbda": 0.0, "max_length": 32, "max_new_tokens": 4, **(settings or {})}),
        train_dataset=talks(),
        processing_class=tokenizer(),
        **weighting,
    )


def trained(trainer: Any, **options: Any) -> dict[str, Any]:
    """What a run logged, and where it ended."""
    trainer.train(**options)
    found = {
        "parameters": [p.detach().clone() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if hasattr(trainer, "weighter"):
        found |= {"weights": trainer.weighter.weights, "statistics": trainer.weighter.statistics}
    return found


# ---- what runs in the processes --------------------------------------------------------------------------------------


def own_and_static(folder: Path) -> dict[str, Any]:
    """TRL's trainer with its own fixed numbers, and ours with the same."""
    from trl import DPOTrainer, SFTTrainer

    found: dict[str, Any] = {}
    numbers = {"loss_weights": list(STATIC.values())}
    found["dpo", "own"] = trained(dpo(folder, DPOTrainer, settings=numbers))
    found["dpo", "static"] = trained(dpo(folder, weighting=StaticWeighting(STATIC)))
    found["dpo equal", "own"] = trained(dpo(folder, DPOTrainer))
    found["dpo equal", "static"] = trained(dpo(folder, weighting=EqualWeighting()))
    for name, settings in (("sft", {}), ("sft whole", {"accumulation": 1}), ("sft dft", {"loss_type": "dft"})):
        tasks = {settings.get("loss_type", "nll"): 1.0, "aux_loss": 0.02}
        found[name, "own"] = trained(sft(folder, SFTTrainer, settings=settings))
        found[name, "static"] = trained(sft(folder, settings=settings, weighting=StaticWeighting(tasks)))
    found["sft scaled"] = trained(sft(folder, weighting=StaticWeighting({"nll": 0.5, "aux_loss": 0.01})))
    found["gkd", "own"] = trained(gkd(folder, own=True))
    weights = {"gkd": 1.0, "nll": 1e-13}  # TRL's own has no second loss
    found["gkd", "static"] = trained(gkd(folder, weighting=StaticWeighting(weights)))
    found["dpo cov"] = trained(dpo(folder, ragged=False, weighting=COV))
    found["gkd cov"] = trained(gkd(folder, weighting=COV))
    found["on policy"] = trained(gkd(folder, settings={"lmbda": 1.0}, weighting=COV))
    return found


def resumed(folder: Path) -> tuple[Any, Any, list[str]]:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(dpo(folder, settings=saving, weighting=COV))
    again = trained(dpo(folder, settings=saving, weighting=COV), resume_from_checkpoint=str(folder / "checkpoint-2"))
    return whole, again, sorted(path.name for path in (folder / "checkpoint-2").iterdir())


def evaluated(folder: Path) -> dict[str, Any]:
    trainer = dpo(folder, settings={"eval_strategy": "steps", "eval_steps": 2}, weighting=COV)
    without = trained(dpo(folder, weighting=COV))
    found = trained(trainer)
    found["evaluations"] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    found["without"] = without
    return found


def refused(folder: Path) -> dict[str, str]:
    from trl import SFTTrainer

    from accel_weighting.integrations.trl import CoefficientsMixin, WeightedDPOTrainer

    class Numbers(WeightedDPOTrainer):
        """Hands in numbers for one of its losses."""

        def hand_in(self, coefficients: Any) -> None:
            super().hand_in({**coefficients, "sft": float(coefficients["sft"].detach())})

    class Unwritten(CoefficientsMixin, SFTTrainer):
        pass

    return {
        "gradients": error_of(lambda: dpo(folder, weighting=GradNorm())),
        "one": error_of(lambda: dpo(folder, settings={"loss_type": ["sft"]}, weighting=COV)),
        "dense": error_of(lambda: sft(folder, experts=False, weighting=COV)),
        "weights": error_of(lambda: dpo(folder, settings={"loss_weights": [1.0, 2.0]}, weighting=COV)),
        "numbers": error_of(lambda: dpo(folder, Numbers, weighting=COV).train()),
        "no tasks": error_of(lambda: sft(folder, Unwritten, weighting=COV)),
        "unwritten": error_of(lambda: sft(folder, Unwritten, tasks=["a", "b"], weighting=COV).train()),
    }


def everything(folder: str) -> dict[str, Any]:
    os.environ["CI"] = "1"  # TRL tells nobody that it was used
    here = Path(folder)
    return {
        "runs": own_and_static(here / "runs"),
        "resumed": resumed(here / "resumed"),
        "evaluated": evaluated(here / "evaluated"),
        "refused": refused(here / "refused"),
    }


# ---- by hand ---------------------------------------------------------------------------------------------------------


def log_probabilities(policy: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def dpo_by_hand() -> dict[str, Any]:
    """A plain loop over the two losses, on whole batches of 8 pairs of equal lengths; weighed by the losses."""
    words, policy = tokenizer(), model()
    reference = copy.deepcopy(policy)
    weighter = Weighter(COV, LOSSES)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    rows = list(pairs(ragged=False))
    for step in range(4):
        ids, completion = [], []
        batch = rows[step % 2 * 8 : step % 2 * 8 + 8]
        for kind in ("chosen", "rejected"):
            for row in batch:
                prompt, answer = words(row["prompt"]).input_ids, [*words(row[kind]).input_ids, 2]
                answer += [0] * (7 - len(answer))
                ids.append(prompt + answer)
                completion.append([0] * len(prompt) + [int(token != 0) for token in answer])
        tokens, answers = torch.tensor(ids), torch.tensor(completion)
        mask = (tokens != 0).long()
        logps = log_probabilities(policy, tokens, mask)
        with torch.no_grad():
            before = log_probabilities(reference, tokens, mask)
        counted = answers[:, 1:]
        chosen, rejected = ((logps - before) * counted).sum(1).chunk(2)
        sigmoid = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        of_chosen = counted.chunk(2)[0].bool()
        weighter.backward({"sigmoid": sigmoid, "sft": -logps.chunk(2)[0][of_chosen].mean()})
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weighter.weights, "parameters": [p.detach() for p in policy.parameters()]}


def gkd_by_hand() -> list[float]:
    """Divergence and token loss of the first 8 talks, over all of their answers' tokens."""
    words, student, teacher = tokenizer(), model(), model(seed=1)
    divergence, nll, number = 0.0, 0.0, 0
    for row in list(talks())[:8]:
        prompt, answer = (words(message["content"]).input_ids for message in row["messages"])
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            p, q = (one(input_ids=ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for one in (student, teacher))
        m = 0.5 * (p + q)
        divergence += float(0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()))
        nll -= float(p.gather(-1, ids[0, len(prompt) :, None]).log().sum())
        number += len(answer)
    return [divergence / number, nll / number]


@pytest.fixture(scope="module")
def dpo_expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(dpo_by_hand, 1, tmp_path_factory.mktemp("dpo"), timeout=240)[0]


@pytest.fixture(scope="module")
def gkd_expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_ranks(gkd_by_hand, 1, tmp_path_factory.mktemp("gkd"), timeout=240)[0]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("trained"))
    return run_ranks(everything, request.param, tmp_path_factory.mktemp("ranks"), folder, timeout=900)


# ---- tests -----------------------------------------------------------------------------------------------------------

OURS = ("weight/", "loss/", "loss_cov/", "weighting/")


def assert_same_parameters(mine: Any, other: Any, atol: float) -> None:
    for p, q in zip(mine["parameters"], other["parameters"], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("run", ["dpo", "dpo equal", "sft", "sft whole", "sft dft", "gkd"])
def test_fixed_weights_are_the_trainers_own_numbers(run: str, ran: Any) -> None:
    for ranks in ran:
        own, static = ranks["runs"][run, "own"], ranks["runs"][run, "static"]
        assert_same_parameters(own, static, atol=1e-12)
        assert (own["parameters"][0] - model(run.startswith("sft")).state_dict()["model.embed_tokens.weight"]).any()


@pytest.mark.parametrize("run", ["dpo", "dpo equal", "sft", "sft whole", "sft dft", "gkd"])
def test_the_trainers_own_metrics_stay(run: str, ran: Any) -> None:
    for ranks in ran:
        own, static = ranks["runs"][run, "own"]["logs"], ranks["runs"][run, "static"]["logs"]
        assert len(own) == len(static) == 4
        for a, b in zip(own, static, strict=True):
            theirs = {name: value for name, value in b.items() if not name.startswith(OURS)}
            assert theirs == pytest.approx(a, rel=ROUNDING, abs=1e-9)
            assert len(b) >= len(a) + 4


def test_the_balance_loss_is_the_one_that_the_trainer_logs(ran: Any) -> None:
    for ranks in ran:
        for run in ("sft", "sft whole"):
            for entry in ranks["runs"][run, "static"]["logs"]:
                assert entry["loss/aux_loss"] == pytest.approx(entry["aux_loss"], rel=ROUNDING)
                total = entry["loss/nll"] + 0.02 * entry["loss/aux_loss"]
                assert total == pytest.approx(entry["loss"], rel=ROUNDING)


def test_the_token_loss_is_the_mean_over_all_tokens_of_the_step(ran: Any) -> None:
    """However its ragged rows are divided: `sft` has two micro-batches, `sft whole` one."""
    for ranks in ran:
        parts, whole = (ranks["runs"][run, "static"]["logs"][0]["loss/nll"] for run in ("sft", "sft whole"))
        assert parts == pytest.approx(whole, rel=ROUNDING)


def test_both_weights_of_the_mixture_of_experts_act(ran: Any) -> None:
    """Half of both is half of the step; one step from the same start."""
    for ranks in ran:
        whole, half = ranks["runs"]["sft", "static"]["logs"], ranks["runs"]["sft scaled"]["logs"]
        assert half[0]["loss"] == pytest.approx(whole[0]["loss"] / 2, rel=ROUNDING)
        assert half[0]["loss/nll"] == pytest.approx(whole[0]["loss/nll"], rel=ROUNDING)
        assert half[0]["loss/aux_loss"] == pytest.approx(whole[0]["loss/aux_loss"], rel=ROUNDING)


def test_dpo_with_cov_is_a_loop_by_hand_over_the_two_losses(ran: Any, dpo_expected: Any) -> None:
    for ranks in ran:
        found = ranks["runs"]["dpo cov"]
        assert found["weights"] == pytest.approx(dpo_expected["weights"], rel=1e-4)
        assert_same_parameters(found, dpo_expected, atol=1e-6)
        assert abs(found["weights"]["sft"] - 0.5) > 0.01


def test_gkd_has_the_divergence_and_the_token_loss_of_a_loop_by_hand(ran: Any, gkd_expected: Any) -> None:
    for ranks in ran:
        first = ranks["runs"]["gkd cov"]["logs"][0]
        assert [first["loss/gkd"], first["loss/nll"]] == pytest.approx(gkd_expected, rel=ROUNDING)
        assert ranks["runs"]["gkd cov"]["weights"]["gkd"] != 0.5


def test_what_the_student_wrote_has_no_token_loss(ran: Any) -> None:
    for ranks in ran:
        assert list(ranks["runs"]["on policy"]["statistics"].present) == [True, False]
        assert "loss/nll" not in ranks["runs"]["on policy"]["logs"][-1]


def test_processes_agree(ran: Any) -> None:
    for name, run in ran[0]["runs"].items():
        for ranks in ran[1:]:
            assert ranks["runs"][name].get("weights") == run.get("weights")
            if "statistics" in run:
                np.testing.assert_array_equal(ranks["runs"][name]["statistics"].losses, run["statistics"].losses)


def test_a_resumed_run_is_the_uninterrupted_one(ran: Any) -> None:
    for ranks in ran:
        whole, again, files = ranks["resumed"]
        assert again["weights"] == whole["weights"]
        assert_same_parameters(again, whole, atol=0)
        assert {"weighter.pt", "trainer_state.json", "model.safetensors", "optimizer.pt"} <= set(files)


def test_evaluation_leaves_no_trace(ran: Any) -> None:
    for ranks in ran:
        found = ranks["evaluated"]
        assert [entry["step"] for entry in found["evaluations"]] == [2, 4]
        assert all("eval_rewards/margins" in entry for entry in found["evaluations"])
        assert found["weights"] == found["without"]["weights"]
        assert_same_parameters(found, found["without"], atol=0)


def test_what_cannot_be_weighed_is_refused_in_words(ran: Any) -> None:
    for ranks in ran:
        said = ranks["refused"]
        assert "needs the tasks' gradients apart" in said["gradients"]
        assert "found ['sft'] alone. DPO: name several in `loss_type`" in said["one"]
        assert "train a mixture of experts" in said["dense"]
        assert "`loss_weights = [1.0, 2.0]` was given, and `weighting` takes its place" in said["weights"]
        assert "no gradient came to that of task `sft`" in said["numbers"]
        assert "Give `tasks` (their names)" in said["no tasks"]
        assert "`Unwritten.hand_in(coefficients)` must be written" in said["unwritten"]
