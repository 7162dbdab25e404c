"""What a new user would miss: warnings of a training that shows nothing, of a map that is too coarse, progress in a log file, and the
prevalence beside every risk. The other silent failures have their tests with what they are about."""
import io
import json

import pytest
import torch

from mammo_nb.core.progress import progress_bar
from mammo_nb.insilico.config import InSilicoConfig
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.fit_health import health_warnings, prediction_health
from mammo_nb.learners.risk import lmvnet_learner
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.risk import risk_dls
from repo import ROOT


# ---- the line of health

def test_the_epoch_that_ranked_four_cancers_well_is_not_trusted():
    "All probabilities below 0.05, most of 1e-6, four cancers, four times the training loss"
    probability = torch.full((40,), 1e-6)
    probability[:4] = .045
    target = torch.zeros(40)
    target[:4] = 1
    health = prediction_health(probability, target)
    assert health['events'] == 4
    assert health['expected_observed'] == pytest.approx((4*.045 + 36e-6)/4)
    found = ' '.join(health_warnings(**health, train_loss=.2, valid_loss=.8))
    for said in ('only 4 cancers in validation', 'more than twice the training loss', 'off by more than a factor of three'):
        assert said in found


def test_equal_predictions_are_named():
    health = prediction_health(torch.full((200,), .3), (torch.arange(200) % 10 < 3).float())
    assert health['expected_observed'] == pytest.approx(1)
    assert health_warnings(**health, train_loss=.6, valid_loss=.6) == ['nearly all predictions are equal']


def test_nothing_is_said_of_a_sound_training():
    probability = torch.linspace(.01, .99, 200)
    target = (torch.arange(200) >= 100).float()
    assert health_warnings(**prediction_health(probability, target), train_loss=.5, valid_loss=.6) == []


# ---- a map of 4 x 3 cells

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('new_user')
    cohort = insilico_cohort(16, seed=3, exams=2, rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(128, 96), workers=1, progress=False)


def test_the_default_stride_on_small_images_gives_a_warning(prepared):
    dls = risk_dls(prepared, bs=2, device='cpu')
    with pytest.warns(UserWarning, match='feature map of 128 x 96 images has only 4 x 3 cells at stride 32'):
        lmvnet_learner(dls)


# ---- progress in a log file

@pytest.mark.parametrize('n', [10, 192, 1000])
def test_a_log_file_gets_a_line_for_every_tenth(n):
    log = io.StringIO()
    assert sum(1 for _ in progress_bar(range(n), desc='prepare', file=log)) == n
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith(f'prepare: {n} of {n}')


def test_preparing_and_rendering_write_ten_lines_to_a_log_file(tmp_path, capsys):
    files = insilico_cohort(12, seed=3, exams=1, rows=96, cols=72, pixel_spacing_mm=2.5).write(tmp_path/'files', workers=1)
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 10
    prepare_cohort(files, tmp_path/'cache', size=(64, 48), workers=1)
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 10


# ---- the prevalence

@pytest.mark.parametrize('page', ['index', 'start/01_first_steps', 'insilico/14_config', 'insilico/15_patients', 'insilico/50_oracle',
                                  'tutorials/05_two_exams_five_years', 'tutorials/10_teach_where_to_look',
                                  'tutorials/15_reading_three_views'])
def test_pages_with_in_silico_cancers_state_the_prevalence(page):
    assert InSilicoConfig().prevalence == .4
    cells = json.loads((ROOT/f'nbs/{page}.ipynb').read_text())['cells']
    prose = ' '.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown').lower()
    assert any(words in prose for words in ('four in ten', '40 %', '400 of 1000'))
    assert 'screening' in prose
