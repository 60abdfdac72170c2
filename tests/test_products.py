"""Products with masks: torch's own, whatever the orders in memory."""

import itertools

import pytest
import torch
from torch import nn

import mcdrop
from mcdrop.products import times, times_

PLACES = [(2, 5), (32, 32), (1, 1), (0, 3)]  # whole pages apart, and not


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 32])
def test_a_product_of_images_and_masks_is_torchs(passes: int, places: tuple[int, int], channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, images_last, mask_last in itertools.product((1, 4), (True, False), (True, False)):
        x = torch.randn(passes, rows, *places, channels, generator=generator).movedim(-1, -3)
        mask = torch.randn(passes, 1, *places, channels, generator=generator).movedim(-1, -3)
        x, mask = x if images_last else x.contiguous(), mask if mask_last else mask.contiguous()
        expected = x * mask
        assert torch.equal(times(x, mask), expected)
        assert torch.equal(times(mask, x), expected)
        written = x.clone()
        assert times_(written, mask) is written
        assert torch.equal(written, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_chain_of_convolutions_with_masks_of_all_units_is_the_loops(rows: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(32, 32, 3, padding=1), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(32 * 32 * 32, 2),
    )  # fmt: skip
    x = torch.randn(rows, 2, 32, 32)
    model = mcdrop.wrap(net, example=x)
    assert model.audit.tier == "captured"
    plan = mcdrop.PassPlan(5, 3, keep_samples=True)
    found = mcdrop.sample(model, x, plan).samples
    assert found is not None
    sites = [mcdrop.Site(site.name, (32, 32, 32), 0.3) for site in model.audit.live]
    first, second = (
        torch.as_tensor(masks)[:, None] / 0.7
        for masks in mcdrop.sample_masks(sites, 5, seed=3, sampler=plan.sampler).values()
    )
    with torch.no_grad():
        for number in range(5):
            hidden = net[3](net[0](x).relu() * first[number]) * second[number]
            torch.testing.assert_close(torch.as_tensor(found[number]), net[6](hidden.flatten(1)), rtol=1e-4, atol=1e-5)
