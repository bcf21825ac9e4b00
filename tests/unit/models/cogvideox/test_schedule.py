"""Reading a model's schedule, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.schedule import NoiseSchedule

FILE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}


def write(folder, content):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(content)
    return folder


def test_reads_the_model_file(tmp_path):
    schedule = NoiseSchedule.from_model(write(tmp_path, json.dumps(FILE | {"num_train_timesteps": 10})))
    assert schedule.num_train_timesteps == 10
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.signal_scale(torch.tensor([9, 9])).tolist() == [0, 0]
    assert schedule.noise_scale(torch.tensor([9])).tolist() == [1]


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
        NoiseSchedule.from_model(write(tmp_path, content))
    assert named in str(error.value)


def test_missing_file_names_the_layout(tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        NoiseSchedule.from_model(tmp_path)


def test_imports_no_model_library():
    code = (
        "import sys, exvideo_train.models.objective;"
        "print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
