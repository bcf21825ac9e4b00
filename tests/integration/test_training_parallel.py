"""Every parallel form computes what a single process without DeepSpeed computes."""

from __future__ import annotations

import pytest
import torch
from support.store import SHORT
from support.trained import STEPS, Trained

from exvideo_train.config.commands import Train
from exvideo_train.config.experiment import plain_config
from exvideo_train.entry import compose_config, to_dataclass
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.objective import noise_levels
from exvideo_train.models.registry import load_backbone
from exvideo_train.training.dataset import LatentDataset
from exvideo_train.training.learning_rate import learning_rate
from exvideo_train.training.order import SampleOrder

TOLERANCE = 1e-5
TWO_RANKS = ["two", "sequence", "zero1", "zero3", "accumulated", "offloaded"]


@pytest.fixture(scope="module")
def reference(trained: Trained) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and adapter of a plain loop: torch's AdamW, one process, no DeepSpeed."""
    config = to_dataclass(compose_config("train", trained.overrides("reference"), Train), Train)
    backbone = load_backbone(trained.model, torch.float32, torch.device("cpu"))
    apply_lora(backbone, LoraExtension.from_options(plain_config(config)), config.seed)
    parameters = lora_parameters(backbone)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
    )
    store = LatentStore.open(trained.latents)
    ids = store.clip_ids(SHORT)
    dataset = LatentDataset(
        store,
        [(SHORT, ids)],
        SampleOrder([len(ids)], [4], config.seed),
        seed=config.seed,
        num_levels=1000,
        caption_dropout=config.data.caption_dropout,
    )
    levels = noise_levels(trained.model)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for position in range(4 * step, 4 * step + 4):
            sample = dataset[position]
            latents, noise = sample.latents_TCHW[None], sample.noise_TCHW[None]
            rows = torch.tensor([sample.row])
            noisy, velocity = levels.mix(latents, noise, rows)
            prediction = backbone(noisy, rows, sample.conditions["text_BLC"][None])
            loss = (prediction - velocity).square().mean() / 4
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), optim.gradient_clip)))
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, optim)
        optimizer.step()
    return losses, norms, {name: parameter.detach() for name, parameter in parameters.items()}


def assert_same(trained: Trained, name: str, reference: tuple, steps: int = STEPS) -> None:
    losses, norms, _ = reference
    assert [record["step"] for record in trained.metrics(name)] == list(range(1, steps + 1))
    torch.testing.assert_close(trained.losses(name), losses[:steps], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(trained.grad_norms(name), norms[:steps], rtol=TOLERANCE, atol=0)


def test_reference_is_worth_comparing(reference: tuple) -> None:
    losses, norms, adapter = reference
    assert min(norms) < 0.09 < max(norms), "clipping is neither always on nor always off"
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5, "the adapter learns"
    assert all(bool(tensor.abs().max() > 0) for tensor in adapter.values())


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(trained: Trained, reference: tuple, name: str) -> None:
    assert trained.two[name]["status"] == 0
    assert_same(trained, name, reference)
    for key, tensor in trained.adapter(name).items():
        torch.testing.assert_close(tensor, reference[2][key.removeprefix("transformer.")], rtol=1e-3, atol=5e-5)


def test_zero3_with_sequence_parallelism(trained: Trained, reference: tuple) -> None:
    assert trained.two["zero3_sequence"]["status"] == 75
    assert_same(trained, "zero3_sequence", reference, steps=5)


def test_a_weight_that_differs_on_one_rank_is_noticed(trained: Trained) -> None:
    assert trained.two["sequence"]["unequal"] is True


@pytest.mark.parametrize("name", ["one", "one_accumulated"])
def test_one_rank(trained: Trained, reference: tuple, name: str) -> None:
    assert trained.one[name]["status"] == 0
    assert_same(trained, name, reference)


def test_four_ranks_as_two_by_two(trained: Trained, reference: tuple) -> None:
    assert trained.four["two_by_two"]["status"] == 0
    assert_same(trained, "two_by_two", reference)


def test_ranks_of_a_sequence_group_share_samples_and_data_groups_do_not(trained: Trained) -> None:
    ranks = [[tuple(batch["positions"]) for batch in batches] for batches in trained.four["two_by_two"]["by_rank"]]
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    for step, (first, second) in enumerate(zip(ranks[0], ranks[2], strict=True)):
        assert [*first, *second] == list(range(4 * step, 4 * step + 4))


def test_mixed_geometries_on_one_rank_and_two(trained: Trained) -> None:
    assert trained.two["mixed"]["status"] == trained.one["mixed_one"]["status"] == 0
    for metric in (trained.losses, trained.grad_norms):
        torch.testing.assert_close(metric("mixed"), metric("mixed_one"), rtol=TOLERANCE, atol=0)
    sizes = [len(batch["clip_ids"]) for batch in trained.two["mixed"]["by_rank"][0]]
    assert set(sizes) == {1, 2}, "both geometries took part, the shorter two samples at a time"
    assert sum(sizes) * 2 == trained.metrics("mixed")[-1]["position"]
