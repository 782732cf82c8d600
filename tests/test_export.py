"The live model's files: what they hold, and which models cannot be exported."

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from cf_guidance.lab import export
from cf_guidance.lab.fashion import _WORDS, random_prompts
from cf_guidance.pipelines import embedded_path


@pytest.fixture(scope='module')
def pipe():
    return StableDiffusionPipeline.from_pretrained(embedded_path())


@pytest.fixture(scope='module')
def about(exported_model):
    return json.loads((exported_model / 'model.json').read_text())


def test_download_is_small(exported_model):
    assert sum(f.stat().st_size for f in exported_model.iterdir()) < 12e6


def test_files_agree_with_torch(exported_model):
    assert max(export.onnx_differences(exported_model).values()) < 1e-5


def test_files_have_no_names_of_this_machine(exported_model):
    for f in exported_model.iterdir():
        assert b'site-packages' not in f.read_bytes(), f.name


def test_sizes_are_listed(exported_model, about):
    files = {k: v['bytes'] for k, v in about['files'].items()}
    assert files == {f.name: f.stat().st_size for f in exported_model.glob('*.onnx')}


@pytest.mark.parametrize('prompt', ['', 'a t-shirt', 'A RED  bag', *random_prompts(20, 0)])
def test_table_of_tokens_is_the_tokenizer(pipe, about, prompt):
    t = about['tokens']
    ids = [t['begin'], *(i for w in prompt.lower().split() for i in t['words'][w]), t['end']]
    ids += [t['pad']] * (t['length'] - len(ids))
    assert ids == pipe.tokenizer(prompt, padding='max_length').input_ids


def test_all_words_are_there(about):
    assert set(about['tokens']['words']) == set(_WORDS)


def test_noise_levels_are_exact(pipe, about):
    found = torch.tensor(about['scheduler']['alphas_cumprod'])
    assert torch.equal(found, pipe.scheduler.alphas_cumprod)


def test_other_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match='dtype: expected'):
        export.export_onnx(folder=tmp_path, dtype=torch.bfloat16)


def test_other_schedulers_are_refused(pipe, tmp_path):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match='scheduler: expected a plain DDIMScheduler'):
        export.export_onnx(other, tmp_path)
    assert not list(tmp_path.iterdir())
