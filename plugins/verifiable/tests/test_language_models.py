"""`verifiable.language_models`: a Markov chain with exact values, folds, and ratios without information."""

import itertools
import json
import math
import random
import re
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn
from weighted_mtp_core.api import Batch, BuildContext, StepView, WmtpError
from weighted_mtp_core.testing import documents

from weighted_mtp_verifiable import (
    LanguageModelsOptions,
    SuccessRatioOptions,
    build_language_models,
    build_success_ratio,
)

# ------------------------------------------------------------------------- a Markov chain with exact values

LETTERS, LENGTH, ROWS = 3, 4, 300
SEQUENCES = list(itertools.product(range(LETTERS), repeat=LENGTH))


def succeeds(sequence):
    """Return whether two neighbouring letters are equal and the sum of all letters is not 3."""
    return any(a == b for a, b in itertools.pairwise(sequence)) and sum(sequence) != 3


def chain():
    """Return the number of copies of each sequence in about `ROWS` responses of a Markov chain."""
    generator = torch.Generator().manual_seed(3)
    next_p = torch.softmax(torch.randn(LETTERS, LETTERS, generator=generator, dtype=torch.double), dim=1)
    return [
        round(
            ROWS * math.prod([1 / LETTERS, *(float(next_p[a, b]) for a, b in itertools.pairwise(sequence))])
        )
        for sequence in SEQUENCES
    ]


def responses(count):
    """Return a batch with one row for each response, after a prompt token."""
    rows = [each for each, times in zip(SEQUENCES, count, strict=True) for _ in range(times)]
    ids_BT = torch.tensor([[0, *each] for each in rows])
    zeros_BT = torch.zeros_like(ids_BT)
    response_BT = (torch.arange(LENGTH + 1) > 0).expand_as(ids_BT)
    reward_BT = torch.tensor([[float(succeeds(each))] for each in rows]) * response_BT
    return Batch(
        ids_BT=ids_BT, document_BT=zeros_BT, response_BT=response_BT, reward_BT=reward_BT, group_BT=zeros_BT
    )


def counted(prefix, count, *, right):
    """Return how many responses begin with a prefix; if `right`, only right responses are counted."""
    return sum(
        times
        for sequence, times in zip(SEQUENCES, count, strict=True)
        if sequence[: len(prefix)] == prefix and (succeeds(sequence) or not right)
    )


def exact_losses(count, *, right):
    """Return the losses of the exact distribution of the next letter given the letters so far."""

    def loss(sequence, n):
        whole = counted(sequence[: n - 1], count, right=right)
        part = counted(sequence[:n], count, right=right)
        return -math.log(part / whole) if part else math.inf if whole else 0.0

    def losses(batch):
        rows = [tuple(row[1:]) for row in batch.ids_BT.tolist()]
        return torch.tensor([[0.0, *(loss(row, n) for n in range(1, LENGTH + 1))] for row in rows])

    return losses


class Table(nn.Module):
    """Computes losses from a table, which contains the logits of the next letter after each prefix."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sum(LETTERS**n for n in range(LENGTH)), LETTERS))

    def forward(self, batch):
        # The rows of the table are the empty prefix, then the prefixes of one letter, of two letters, ...
        state_BT, prefix_B = [], torch.zeros(len(batch.ids_BT), dtype=torch.long)
        for n in range(LENGTH):
            state_BT.append(prefix_B + sum(LETTERS**shorter for shorter in range(n)))
            prefix_B = LETTERS * prefix_B + batch.ids_BT[:, n + 1]
        log_p_BTV = torch.log_softmax(self.logits, dim=1)[torch.stack(state_BT, dim=1)]
        loss_BT = -log_p_BTV.gather(2, batch.ids_BT[:, 1:, None]).squeeze(2)
        return nn.functional.pad(loss_BT, (1, 0)) * batch.response_BT


def context(**model):
    return BuildContext(
        seed=0, storage=Path("storage"), model=attrs.evolve(documents.model_context(), **model)
    )


def critic_of(options, **model):
    return build_language_models(LanguageModelsOptions(**options), context(**model))


def exact_critic(count):
    losses = {"right": exact_losses(count, right=True), "all": exact_losses(count, right=False)}
    return critic_of(
        {"right_model": "right", "all_model": "all"}, frozen_losses=lambda path: losses[str(path)]
    )


def weights(critic, batch, **options):
    """Return the weights of `success_ratio` with this critic."""
    n_future = 2
    target_BTK = torch.zeros(*batch.ids_BT.shape, n_future, dtype=torch.bool)
    for k in range(1, n_future + 1):
        target_BTK[:, :-k, k - 1] = batch.response_BT[:, k:]
    view = StepView(
        ids_BT=batch.ids_BT,
        document_BT=batch.document_BT,
        response_BT=batch.response_BT,
        target_BTK=target_BTK,
        n_future=n_future,
        step=0,
        training=True,
        reward_BT=batch.reward_BT,
        log_value_BT=critic.score(batch, None).log_value_BT,
    )
    return build_success_ratio(SuccessRatioOptions(cap=100.0, **options), context()).weigh(view).weight


def closed_form(sequence, start, end, count):
    """Return V after `end` letters divided by V after `start` letters; None if the latter is 0."""
    value = [
        counted(sequence[:n], count, right=True) / counted(sequence[:n], count, right=False)
        for n in (start, end)
    ]
    return value[1] / value[0] if value[0] else None


def assert_closed_form(critic, count, **tolerance):
    """Compare the weights of every token, and of every path of one or two tokens, with the closed form."""
    batch = responses([min(times, 1) for times in count])
    weight_BT, path_BTK = weights(critic, batch), weights(critic, batch, heads="path")
    for row, ids in enumerate(batch.ids_BT.tolist()):
        for n, k in itertools.product(range(LENGTH), (1, 2)):
            if n + k > LENGTH:
                continue
            expected = closed_form(tuple(ids[1:]), n, n + k, count)
            if expected is not None:
                assert float(path_BTK[row, n, k - 1]) == pytest.approx(expected, **tolerance)
                if k == 1:
                    assert float(weight_BT[row, n + 1]) == pytest.approx(expected, **tolerance)


def test_with_exact_models_the_weights_are_the_ratios_of_exact_values():
    assert_closed_form(exact_critic(chain()), chain(), abs=1e-5)


def test_the_sum_of_log_ratios_is_the_logarithm_of_the_value_relative_to_the_prompt():
    count = chain()
    batch = responses([min(times, 1) for times in count])

    log_value_BT = exact_critic(count).score(batch, None).log_value_BT

    prompt = counted((), count, right=True) / counted((), count, right=False)
    for row, ids in enumerate(batch.ids_BT.tolist()):
        for n in range(LENGTH + 1):
            found = prompt * math.exp(log_value_BT[row, n])
            prefix = tuple(ids[1 : n + 1])
            exact = counted(prefix, count, right=True) / counted(prefix, count, right=False)
            assert found == pytest.approx(exact, abs=1e-6)


def test_trained_models_agree_with_the_exact_ratios_within_two_percent():
    count = chain()
    batch, critic = responses(count), critic_of({}, trainable_losses=Table)
    optimiser = torch.optim.LBFGS(
        list(critic.parameters()), max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss():
        optimiser.zero_grad()
        total = critic.loss(batch, None).loss
        total.backward()
        return total

    optimiser.step(loss)

    assert_closed_form(critic, count, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"heads": "path"}, {"where": "wrong"}])
def test_power_zero_gives_the_weights_of_the_uniform_baseline_bit_for_bit(options):
    batch = responses([1] * len(SEQUENCES))

    found = weights(critic_of({}, trainable_losses=Table), batch, power=0.0, **options)

    mask = batch.response_BT if found.ndim == 2 else found > 0
    assert torch.equal(found, mask.float())
    assert mask.any()


def test_a_fall_of_hundreds_of_nats_is_not_lost():
    """The value itself would be 0 in float32, and all later weights would be 1."""
    batch = documents.PACKED.batch()
    losses = {"right": 300.0 * batch.response_BT, "all": 299.0 * batch.response_BT}
    critic = critic_of(
        {"right_model": "right", "all_model": "all"}, frozen_losses=lambda path: lambda _: losses[str(path)]
    )
    log_value_BT = critic.score(batch, None).log_value_BT

    view = documents.PACKED.view(())
    view = attrs.evolve(view, reward_BT=batch.reward_BT, log_value_BT=200 * log_value_BT)
    found = build_success_ratio(SuccessRatioOptions(), context()).weigh(view).weight

    assert float(log_value_BT.min()) == -7.0  # the longest response has seven tokens
    assert not found.any()


# -------------------------------------------------------------------------------------------- what they learn


def gradients(critic, batch):
    """Return for each model whether the loss of a batch has a gradient other than 0."""
    for parameter in critic.parameters():
        parameter.grad = None
    critic.loss(batch, None).loss.backward()
    return [any(each.grad.any() for each in model.parameters()) for model in critic._models]


def test_the_model_of_right_responses_learns_from_no_wrong_response():
    right, wrong = documents.Layout(rows=[[documents.FIRST]]), documents.Layout(rows=[[documents.SECOND]])
    critic = critic_of({})

    assert gradients(critic, right.batch()) == [True, True]
    assert gradients(critic, wrong.batch()) == [False, True]


def test_a_token_of_a_short_response_counts_as_much_as_a_token_of_a_long_one():
    """The loss of a batch is a sum over tokens, divided by numbers that do not depend on response lengths."""
    critic = critic_of({})
    alone = [critic.loss(documents.Layout(rows=[[each]], padding=0).batch(), None).loss for each in LEARNED]
    together = critic.loss(documents.Layout(rows=[[each] for each in LEARNED]).batch(), None).loss

    torch.testing.assert_close(together, torch.stack(alone).mean())


LEARNED = (documents.FIRST, documents.THIRD)


def test_the_metrics_of_a_batch_are_the_means_of_those_of_its_rows():
    """So metrics do not depend on micro-batches and processes, even if one of them has no right response."""
    critic, rows = critic_of({}), (documents.FIRST, documents.SECOND)
    alone = [critic.loss(documents.Layout(rows=[[each]], padding=0).batch(), None).metrics for each in rows]

    together = critic.loss(documents.Layout(rows=[[each] for each in rows]).batch(), None)

    for name, value in together.metrics.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in alone]).mean())
    torch.testing.assert_close(together.loss, torch.stack(list(together.metrics.values())).sum())


def test_out_of_fold_models_have_not_learned_from_the_problem_that_they_score():
    critic = critic_of({"folds": 2})
    for document in (documents.FIRST, documents.THIRD):
        batch = documents.Layout(rows=[[document]]).batch()
        fold = int(batch.problem_BT.max()) % 2
        learned = gradients(critic, batch)
        before = critic.score(batch, None).log_value_BT

        assert learned == [fold == 1, fold == 1, fold == 0, fold == 0]
        change([model for model, learns in zip(critic._models, learned, strict=True) if learns])
        assert torch.equal(critic.score(batch, None).log_value_BT, before)
        change([model for model, learns in zip(critic._models, learned, strict=True) if not learns])
        assert not torch.equal(critic.score(batch, None).log_value_BT, before)


@torch.no_grad()
def change(models):
    """Change each model differently, because the ratio of equal models is always 1."""
    for number, model in enumerate(models, start=1):
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * number)


def test_adapters_share_the_parameters_of_one_base():
    critic = critic_of({"lora_rank": 2})
    first, second = critic._models
    bases = [{n: p for n, p in each.named_parameters() if not p.requires_grad} for each in (first, second)]
    trained = [p for each in (first, second) for p in each.parameters() if p.requires_grad]

    assert bases[0].keys() == bases[1].keys()
    assert all(bases[0][name] is bases[1][name] for name in bases[0])
    assert list(map(id, critic.parameters())) == list(map(id, trained))
    assert len({id(parameter) for parameter in trained}) == len(trained)
    stored = [name for name in critic.state_dict() if "lora_" not in name]
    assert len(stored) == len(bases[0])  # the base is stored once


def test_adapters_begin_as_the_policy_and_the_base_stays_as_it_is():
    batch, critic = documents.PACKED.batch(), critic_of({"lora_rank": 2})
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    for model in critic._models:
        torch.testing.assert_close(model(batch).detach(), documents.next_token_losses(batch))
    optimiser = torch.optim.SGD(critic.parameters(), lr=0.1)

    for _ in range(2):  # one matrix of an adapter is 0 at first, so the other one has no gradient
        critic.loss(batch, None).loss.backward()
        optimiser.step()

    changed = {name for name, tensor in critic.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_the_state_of_other_models_is_refused():
    with pytest.raises(WmtpError, match="the state is not that of these `language_models`"):
        critic_of({"folds": 2}).load_state_dict(critic_of({}).state_dict())


def test_folds_need_to_know_the_problems():
    batch = attrs.evolve(documents.PACKED.batch(), problem_BT=None)

    with pytest.raises(WmtpError, match="`folds` needs batches that contain the hash of each problem's id"):
        critic_of({"folds": 2}).score(batch, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"right_model": "a"}, "`right_model` and `all_model` must be given together: None"),
        ({"all_model": "a"}, "`right_model` and `all_model` must be given together: a"),
        ({"right_model": "a", "all_model": "b", "folds": 2}, "must be 1 for models that are not trained"),
        ({"right_model": "a", "all_model": "b", "lora_rank": 2}, "must be 0 for models that are not trained"),
        ({"folds": 0}, "'folds' must be >= 1: 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        LanguageModelsOptions(**options)


# ------------------------------------------------------------------------------------------------- whole runs


def write(folder, *, tells):
    """Write responses that end in `!` or `?`: if `tells`, `!` is right, otherwise the mark is random."""
    chance = random.Random(0)
    for split, count in {"train": 150, "validation": 100, "test": 2}.items():
        rows = []
        for number in range(count):
            right, mark = number % 2 == 0, chance.random() < 0.5
            letters = " ".join(chance.choices("abcd", k=3)) + (" !" if (right if tells else mark) else " ?")
            row = {"problem_id": f"{split}/{number}", "instruction": "Write.", "output": letters}
            rows.append(json.dumps({**row, "is_correct": right}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def recipe(folder, **critic):
    train = {"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "validate_every": 20}
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "data": {"use": "core.jsonl", "options": files},
        "weighting": {"use": "verifiable.success_ratio"},
        "critic": {
            "use": "verifiable.language_models",
            "allow_uninformative_critic": False,
            "train": {**train, "validation_examples": 100},
            **critic,
        },
    }


@pytest.mark.slow
def test_models_that_tell_right_from_wrong_weigh_the_token_that_decides(tmp_path, wmtp_tiny_run):
    write(tmp_path, tells=True)

    run = wmtp_tiny_run(recipe(tmp_path, cache=True))

    assert run.metrics["critic_auc"] > 0.99
    table = (run.folder / "evaluation" / "token_values.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in table.splitlines()]
    assert all(0 <= line["value"] <= 1 for line in lines)
    lightest = [
        min(tokens, key=lambda token: token["weight"])["token"].strip()
        for _, (*tokens,) in itertools.groupby(lines, key=lambda line: line["example"])
        if tokens[0]["reward"] == 0
    ]
    assert lightest.count("?") / len(lightest) > 0.95


@pytest.mark.slow
def test_models_of_rewards_without_a_meaning_stop_the_run(tmp_path, wmtp_tiny_run, capsys):
    write(tmp_path, tells=False)

    with pytest.raises(AssertionError, match="the run failed"):
        wmtp_tiny_run(recipe(tmp_path))

    said = capsys.readouterr()
    assert "critic `verifiable.language_models` is no better than a constant: AUC 0." in said.err
    assert (
        "hint: train it longer or on more data, or set `critic.allow_uninformative_critic = true`" in said.err
    )
    assert "policy: " not in said.out  # stage 2 never began


@pytest.mark.slow
def test_a_contrast_of_two_models_of_the_same_data_stops_the_run(tmp_path, wmtp_tiny_run, wmtp_cli, capsys):
    """The two runs differ only in `run.seed`, so the ratio of their models is noise."""
    write(tmp_path, tells=True)
    table = {
        "data": recipe(tmp_path)["data"],
        "train": {"steps": 15, "learning_rate": 1e-2},
        "weighting": {"use": "verifiable.group_advantage"},
    }
    first = wmtp_tiny_run(table).folder

    def run(*changes):
        return wmtp_cli("run", "recipe.toml", *(word for each in changes for word in ("--set", each)))

    assert run("run.seed=7", "run.name=second") == 0
    (second,) = (path.parent for path in Path("storage/runs").glob("*/*/second/*/run.json"))
    capsys.readouterr()
    contrast = (
        "run.name=contrast",
        "weighting.use=verifiable.success_ratio",
        'critic={ use = "verifiable.language_models", train.validation_examples = 100 }',
        f"critic.options.right_model={first}",
        f"critic.options.all_model={second / 'checkpoints' / 'best_model.pt'}",
    )

    code = run(*contrast)

    said = capsys.readouterr()
    assert code == 1
    assert "critic `verifiable.language_models` is no better than a constant: AUC 0." in said.err
    assert "policy: " not in said.out
    assert run(*contrast, "critic.allow_uninformative_critic=true") == 0
    assert (
        "WARNING: critic `verifiable.language_models` is no better than a constant" in capsys.readouterr().out
    )
