"The three commands with a system whose predictions are images."
import pandas as pd
import pytest
from PIL import Image

from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.train import mammo_train
from mammo_nb.insilico.files import insilico_cohort


def test_train_predict_evaluate(tmp_path, capsys):
    "With radiomics; each breast with a CC has a drawing, and test breasts have an SSIM"
    pytest.importorskip('radiomics')
    cohort = insilico_cohort(20, seed=3, exams=1, benign=1., rows=192, cols=144, pixel_spacing_mm=1.25)
    cohort.write(tmp_path/'files', workers=1, progress=False)
    folders = [str(tmp_path/name) for name in ('files', 'model', 'predictions')]
    settings = dict(size='64x48', epochs=1, workers=1, quiet=True)
    assert mammo_train('radiomics_gan', *folders[:2], data='bs=4', set='perceptual=False accumulate=1', **settings) == 0
    assert mammo_predict(*folders, workers=1, quiet=True) == 0
    table = pd.read_csv(tmp_path/'predictions'/'predictions.csv')
    breasts = cohort.images.drop_duplicates(['exam_id', 'laterality'])
    for name in ('drawn', 'drawn_mask'):
        own = table[table.output == name]
        assert len(own) == len(breasts)
        for path in own.path:
            assert Image.open(tmp_path/'predictions'/path).size == (48, 64)
    capsys.readouterr()
    assert mammo_evaluate(str(tmp_path/'predictions'/'predictions.csv'), split='test', n_boot=20) == 0
    assert 'ssim_breast' in capsys.readouterr().out
