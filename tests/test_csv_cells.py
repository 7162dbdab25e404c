"""Texts of others in CSV files: no cell that a spreadsheet would run, and every value comes back."""
import csv
import re
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cli.train import mammo_train
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.gaze.readings import read_gaze, write_fixations
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.metrics.predictions import predictions_table, read_predictions, write_predictions

STARTS = ['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠']
TEXTS = ['=1+1', '=HYPERLINK("http://x","y")', '+49', '-1.5', '-', '@SUM(1)', '\tx', '\rx', '\nx', ' =1', '＝1',
         "'", "''", "'=1", "''=1", "' =1", "'twas", 'P-001', 'a,b', 'a"b', '"=1"', '007', '1e5']


def cells(path):
    "All cells of a CSV file, as a spreadsheet splits it"
    with open(path, newline='', encoding='utf-8') as f:
        return [cell for row in csv.reader(f) for cell in row]


def is_number(text): return bool(re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?|-?inf', text))


def assert_safe(path):
    dangerous = [cell for cell in cells(path) if cell.strip(' ')[:1] in STARTS and not is_number(cell)]
    assert not dangerous, dangerous


# ---- one writer, one reader

@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from([*STARTS, "'", '"', ',', ' ', 'a', '1', '\xa0']), max_size=6))
def test_any_cell_comes_back(text):
    from mammo_nb.core.tables import escape_cell, unescape_cell
    written = escape_cell(text)
    assert unescape_cell(written) == text
    assert written[:1] not in STARTS and written.strip()[:1] not in ('=', '+', '-', '@')
    assert len(written) <= len(text)+1


def test_a_table_comes_back(tmp_path):
    from mammo_nb.core.tables import read_csv, write_csv
    table = pd.DataFrame({'=id': TEXTS, 'kind': pd.Categorical(TEXTS), 'value': -np.arange(len(TEXTS))/2})
    before = table.copy()
    write_csv(table, tmp_path/'t.csv')
    assert_safe(tmp_path/'t.csv')
    again = read_csv(tmp_path/'t.csv', dtype={"'=id": str, 'kind': str}, keep_default_na=False)
    assert list(again) == list(table)
    assert again['=id'].tolist() == again.kind.tolist() == TEXTS
    assert again.value.tolist() == table.value.tolist() # numbers stay numbers
    pd.testing.assert_frame_equal(table, before) # what is written is not changed
    assert '-0.5' in cells(tmp_path/'t.csv')


def test_missing_values_and_objects_are_left_alone(tmp_path):
    from mammo_nb.core.tables import read_csv, write_csv
    table = pd.DataFrame({'a': ['=1', None, -1.5, True], 'b': [np.nan, -2, 3, 4], 'c': pd.to_datetime(['2020-01-01']*4)})
    write_csv(table, tmp_path/'t.csv')
    assert (tmp_path/'t.csv').read_text() == "a,b,c\n'=1,,2020-01-01\n,-2.0,2020-01-01\n-1.5,3.0,2020-01-01\nTrue,4.0,2020-01-01\n"
    again = read_csv(tmp_path/'t.csv')
    assert again.a.fillna('').tolist() == ['=1', '', '-1.5', 'True'] and again.b.tolist()[1:] == [-2, 3, 4]


@pytest.mark.parametrize('separator', [';', '\t', '\r'])
def test_cells_that_another_program_would_cut_are_quoted(tmp_path, separator):
    from mammo_nb.core.tables import read_csv, write_csv
    text = f'x{separator}=1+1'
    write_csv(pd.DataFrame(dict(a=[text, 'ok'], b=[1, 2])), tmp_path/'t.csv')
    with open(tmp_path/'t.csv', newline='') as file:
        assert file.read().splitlines(keepends=False)[0] == '"a","b"'
    assert f'"{text}",1' in (tmp_path/'t.csv').read_bytes().decode()
    assert read_csv(tmp_path/'t.csv').a[0].replace('\n', '\r') == text


def test_an_empty_table(tmp_path):
    from mammo_nb.core.tables import read_csv, write_csv
    write_csv(pd.DataFrame(columns=['path', '=what'], dtype=str), tmp_path/'t.csv')
    assert list(read_csv(tmp_path/'t.csv')) == ['path', '=what']


# ---- tables of the library

def test_predictions_come_back(tmp_path):
    texts = [text for text in TEXTS if text.strip()]
    rows = pd.DataFrame(dict(patient_id=texts, exam_id=texts, laterality='L', image_id=texts))
    table = predictions_table(rows, -np.arange(len(texts))/3, '=system', '+score', '@v1')
    write_predictions(table, tmp_path/'p.csv')
    assert_safe(tmp_path/'p.csv')
    pd.testing.assert_frame_equal(read_predictions(tmp_path/'p.csv'), table)


def test_a_table_of_someone_else_keeps_its_quotes(tmp_path):
    "Only a quote before a formula is taken away"
    rows = pd.DataFrame(dict(patient_id=["'7", "O'Neill"], exam_id=["'7", 'x'], laterality='L'))
    predictions_table(rows, [.1, .2], 's', 'probability', 'v').to_csv(tmp_path/'p.csv', index=False)
    assert read_predictions(tmp_path/'p.csv').patient_id.tolist() == ["'7", "O'Neill"]


def test_names_of_readings(tmp_path):
    fixations = pd.DataFrame(dict(row=[1., 2, 3], col=[-1., 2, 3], duration_ms=100., reading=['=1+1', '-b', '=1+1']))
    write_fixations(tmp_path/'g.csv', fixations)
    assert_safe(tmp_path/'g.csv')
    assert read_gaze(tmp_path/'g.csv').reading.tolist() == [0, 1, 0]


# ---- from files to metrics

PREFIXES = ['=', '+', '-', '@', "'=", '=1+1', '-2', "'"]


def odd(ids):
    "Ids that begin like formulas, the same for the same id"
    codes, names = pd.factorize(ids)
    return [f'{PREFIXES[code % len(PREFIXES)]}{names[code]}' for code in codes]


@pytest.fixture(scope='module')
def odd_folder(tmp_path_factory):
    "In-silico patients whose ids and files begin like formulas; one file is broken"
    folder = tmp_path_factory.mktemp('cohort')
    drawn = insilico_cohort(24, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25)
    cohort = drawn.write(folder, workers=1, progress=False)
    images = cohort.images.reset_index(drop=True)
    names = dict(zip(images.image_id, odd(images.image_id)))
    paths = [f'{start}{number}.dcm' for number, start in enumerate(np.resize(['=', '+', '-', '@'], len(images)))]
    for old, new in zip(images.path, paths): (folder/old).rename(folder/new)
    (folder/paths[0]).write_bytes((folder/paths[0]).read_bytes()[:3000])
    images = images.assign(path=paths, image_id=images.image_id.map(names), patient_id=odd(images.patient_id), exam_id=odd(images.exam_id))
    findings = cohort.findings.assign(image_id=cohort.findings.image_id.map(names))
    Cohort(images, findings, folder).write(folder)
    return folder


def test_ids_like_formulas_from_files_to_metrics(odd_folder, tmp_path, capsys):
    cohort = Cohort.read(odd_folder)
    assert mammo_prepare(str(odd_folder), str(tmp_path/'cache'), size='64x48', workers=1, quiet=True) == 1 # the broken file
    options = dict(size='64x48', epochs=1, set='encoder=small stride=8', workers=1, quiet=True, cache=str(tmp_path/'cache'))
    assert mammo_train('two_view', str(odd_folder), str(tmp_path/'model'), **options) == 0
    out = tmp_path/'o'
    assert mammo_predict(str(odd_folder), str(tmp_path/'model'), out=str(out), overlays=False, workers=1, quiet=True) == 1
    assert mammo_evaluate(str(out/'predictions.csv'), split='test', n_boot=20, out=str(tmp_path/'metrics.csv')) == 0
    written = [*tmp_path.rglob('*.csv')]
    assert {'failures.csv', 'notes.csv', 'history.csv', 'left_out.csv', 'images.csv', 'predictions.csv', 'metrics.csv'} <= {p.name for p in written}
    for path in written: assert_safe(path)
    table = read_predictions(out/'predictions.csv')
    assert set(table.exam_id) <= set(cohort.images.exam_id) and set(table.patient_id) == set(cohort.images.patient_id)
    assert any(cell.startswith("'=") for cell in cells(out/'predictions.csv'))
    again = mammo_predict(str(odd_folder), str(tmp_path/'model'), out=str(tmp_path/'q'), format='parquet', overlays=False, workers=1, quiet=True)
    assert again == 1
    pd.testing.assert_frame_equal(read_predictions(tmp_path/'q/predictions.parquet'), table, check_like=True)
