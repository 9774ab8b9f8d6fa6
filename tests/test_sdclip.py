"SDClip, GPTQ and int8 rows against the published quantizer."
import json

import numpy as np
import pytest
import torch

from pgolf.squeeze.gptq import hessian_error
from pgolf.squeeze.quant import int_grid, quantize, to_codes
from pgolf.squeeze.sdclip import clip_gptq, clip_scale


@pytest.mark.parametrize("i", range(5))
def test_scales_and_codes_are_the_published_ones(golden, i):
    z = golden("frontier_functions")
    meta = json.loads(str(z[f"gptq/{i}/meta"]))
    W, H = torch.from_numpy(z[f"gptq/{i}/W"]), torch.from_numpy(z[f"gptq/{i}/H"])
    grid = int_grid(meta["bits"])
    assert grid.hi == meta["clip_range"]
    scale = clip_scale(W, meta["clip_sigmas"], grid)
    np.testing.assert_array_equal(scale.half()[:, 0], z[f"gptq/{i}/scale"])
    np.testing.assert_array_equal(to_codes(W, scale, grid), z[f"gptq/{i}/rtn_q"])
    codes = clip_gptq(W, H, scale, grid)
    np.testing.assert_array_equal(codes, z[f"gptq/{i}/q"])
    for q, key in ((codes, "err_gptq"), (to_codes(W, scale, grid), "err_rtn")):
        got = hessian_error(W.double(), (q*scale).double(), H.double())
        assert got == pytest.approx(float(z[f"gptq/{i}/{key}"]), rel=1e-6)


def test_gate_rows_are_the_published_ones(golden):
    z = golden("frontier_functions")
    q = quantize(torch.from_numpy(z["gate8/in"]), int_grid(8))
    np.testing.assert_array_equal(q.codes, z["gate8/q"])
    np.testing.assert_array_equal(q.scale[:, 0], z["gate8/scale"])
    assert not q.codes[2].any(), "a row of zeros"


@pytest.mark.parametrize("value", [0., .25, -3.])
def test_a_row_without_spread_keeps_its_value(value):
    W = torch.full((2, 64), value)
    scale = clip_scale(W, 12.85, int_grid(6))
    back = to_codes(W, scale, int_grid(6))*scale
    assert back.isfinite().all() and (back-W).abs().max() <= 1e-3*abs(value)
