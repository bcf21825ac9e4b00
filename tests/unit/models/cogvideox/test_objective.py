"""Reading a model's schedule, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.objective import noise_levels

FILE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}


def write(folder, content):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(content)
    return folder


def test_reads_the_model_file(tmp_path):
    levels = noise_levels(write(tmp_path, json.dumps(FILE | {"num_train_timesteps": 10})))
    assert len(levels) == 10
    assert (levels.signal_L[9], levels.noise_L[9]) == (0, 1)
    assert levels.told_at(torch.tensor([9, 0])).tolist() == [9, 0]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (json.dumps(FILE | {"prediction_type": "epsilon"}), "prediction_type='epsilon'"),
        (json.dumps({}), "prediction_type='epsilon'"),
        (json.dumps(FILE | {"beta_schedule": "squaredcos_cap_v2"}), "beta_schedule='squaredcos_cap_v2'"),
        (json.dumps(FILE | {"snr_shift_scale": 0}), "snr_shift_scale=0"),
        ('{"prediction', "not JSON"),
        ("[]", "not an object"),
    ],
)
def test_refuses_with_file_and_value(tmp_path, content, named):
    with pytest.raises(UserError, match=r"scheduler_config\.json") as error:
        noise_levels(write(tmp_path, content))
    assert named in str(error.value)


def test_missing_file_names_the_layout(tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        noise_levels(tmp_path)


def test_imports_no_model_library():
    code = (
        "import sys, exvideo_train.models.cogvideox.objective;"
        "print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
