"Ids that are half a formula, a path, a device or another id in a different spelling: drawn as they are, and never one file"
import ast
import re
import unicodedata
import warnings
from types import SimpleNamespace

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from repo import ROOT

import mammo_nb.gaze.check as gaze_check
import mammo_nb.learners.systems as systems
import mammo_nb.report.overlay as overlay
from mammo_nb.cohort.hanging import show_exam
from mammo_nb.core.geometry import Affine
from mammo_nb.insilico.projection import show_scaled
from mammo_nb.metrics.calibration import plot_calibration
from mammo_nb.metrics.froc import plot_froc
from mammo_nb.metrics.roc import plot_roc
from mammo_nb.preparation.annotations import show_prepared
from mammo_nb.preparation.prepared import Prepared
from mammo_nb.registration.error import show_registration
from mammo_nb.report.overlay import show_maps
from mammo_nb.samples.sample import Field, Sample

TEXTS = ['$x^$', r'$\frac{$', 'a$b_c$d', r'\$x$', '$', 'nul\0 bell\a', 'two\nlines', 'x'*100_000, 'a\n'*5000, '\ud800', '\u202eabc']
SIZE = (24, 16)


def image(): return np.random.default_rng(0).random(SIZE, np.float32)


def prepared_image():
    mask = np.ones(SIZE, bool)
    return Prepared(image()[None], mask, Affine.identity(), SIZE, 'L', 1.)


def prepared_cohort(text):
    "A cohort of one image with this id, as far as drawing asks for it"
    p = prepared_image()
    nothing = np.zeros((0, 4))
    cohort = SimpleNamespace(images=pd.DataFrame(dict(image_id=[text]), dtype=object))
    return SimpleNamespace(
        cohort=cohort, keys={text: 'k'}, config=None, load=lambda i: p, boxes=lambda i: nothing, nipple=lambda i: None)


def predictions():
    rng = np.random.default_rng(0)
    label = np.arange(40) % 2
    ids = dict(patient_id=[f'p{i}' for i in range(40)], exam_id=[f'e{i}' for i in range(40)], laterality='L', split='test')
    kind = dict(system='two_view', output='probability', version='1')
    return pd.DataFrame(ids | kind | dict(label=label, value=np.clip(.3*label+.7*rng.random(40), 0, 1)))


def draw_maps(text): show_maps(dict(cc=prepared_image()), dict(cc=image()), title=text, unit=text)
def draw_exam(text): show_exam({'L-CC': image()}, {'L-CC': [[2, 2, 9, 9]]}, text, labels={'L-CC': [text]})
def draw_scaled(text): show_scaled(image(), 1., title=text)
def draw_registration(text): show_registration(torch.tensor(image()), torch.tensor(image()), torch.zeros(2, *SIZE), title=text)
def draw_roc(text): plot_roc({text: predictions(), 'other': predictions()}, n_boot=10)
def draw_calibration(text): plot_calibration({text: predictions()}, n_boot=10)
def draw_froc(text): plot_froc({text: pd.DataFrame(dict(fppi=[0, 1], recall=[.1, .9], low=[0, .8], high=[.2, 1]))})


def draw_sample(text):
    class Odd(Sample):
        image = Field('image', grid='cc', label=text)
        def title(self): return text
        def caption(self): return text
    Odd(image=torch.tensor(image())[None]).show()


def draw_prepared(text): show_prepared(prepared_cohort(text), text)


def draw_gaze(text):
    look = gaze_check.ImageGaze(text, prepared_image(), np.array([[3., 3.]]), np.array([100.]))
    gaze_check.show_gaze_sheet(prepared_cohort(text), [look])


DRAW = [draw_maps, draw_exam, draw_scaled, draw_registration, draw_roc, draw_calibration, draw_froc, draw_sample, draw_prepared, draw_gaze]


@pytest.mark.parametrize('draw', DRAW, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize('text', TEXTS, ids=lambda text: ascii(text[:8]))
def test_any_text_can_be_drawn_and_saved(draw, text, tmp_path):
    "Half a formula ended the drawing; a long title made an image that is too wide to be saved"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # letters that the font lacks, axes that a title leaves no room
        draw(text)
        plt.gcf().savefig(tmp_path/'f.png', bbox_inches='tight', dpi=60)
    plt.close('all')


def drawn_texts(fig):
    "What is drawn, with the dollar signs that matplotlib draws"
    shown = []
    for text in fig.findobj(matplotlib.text.Text):
        parsed, kind = text._preprocess_math(text.get_text())
        assert not kind, parsed
        shown.append(parsed)
    return ' '.join(shown)


@pytest.mark.parametrize('draw', DRAW, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize('text', ['$x$', 'a$b_c$d', r'\$x^2$'])
def test_a_text_with_dollar_signs_is_drawn_as_it_is(draw, text):
    "A whole formula lost its dollar signs without a word"
    draw(text)
    assert text in drawn_texts(plt.gcf())
    plt.close('all')


# -- one way for every text

PLACES = dict(set_title=0, suptitle=0, set_xlabel=0, set_ylabel=0, text=2, annotate=0, set_xticklabels=0, set_yticklabels=0)
OWN_TEXTS = { # module -> arguments that no table, file or user provides
    'cohort/hanging.py': {'key', "f'{key}\\nmissing'"}, 'core/diagram.py': {'text', 'label', 'name'},
    'gaze/fixations.py': {'i + 1'}, 'registration/error.py': {'name'}, 'report/tour_gaze.py': {'GAZE_VARIANTS[variant]'},
    'report/tour_lesions.py': {'title'}, 'report/tour_other_view.py': {'title'}, 'report/tour_two_view.py': {"f'{name} patients'", 'name'},
    'samples/sample.py': {'title'},
    'samples/three_views.py': {"f'{score:.2f}'", 'image_id', 'main'}} # its `annotate` draws nothing


def texts_of_figures(path):
    "Sources of the arguments that matplotlib draws, without constants and `figure_text(...)`"
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute): continue
        place = PLACES.get(call.func.attr)
        found = call.args[place:place+1] if place is not None else []
        if call.func.attr in ('plot', 'step', 'bar', 'scatter', 'colorbar'):
            found += [k.value for k in call.keywords if k.arg == 'label']
        for value in found:
            is_safe = isinstance(value, ast.Call) and getattr(value.func, 'id', '') == 'figure_text'
            if not is_safe and not isinstance(value, ast.Constant): yield ast.unparse(value)


def test_every_text_of_a_figure_passes_through_figure_text():
    assert len(list(texts_of_figures(ROOT/'mammo_nb/core/diagram.py'))) >= 3
    for path in sorted((ROOT/'mammo_nb').rglob('*.py')):
        name = path.relative_to(ROOT/'mammo_nb').as_posix()
        new = set(texts_of_figures(path)) - OWN_TEXTS.get(name, set()) - {'label'}
        assert not new, (name, new)


# -- one file for each id

IDS = ['a/b', 'a b', 'a_b', 'A_b', 'a\\b', 'a:b', 'a\0b', '../a_b', '/a_b', '.a_b', 'a_b.', 'a_b ', '-a_b', '~a_b', 'CON', 'con.2024', 'nul', 'x'*300,
       'X'*300, 'x'*299, 'ä', 'a\u0308', 'ß', 'ss', '', '.', '..', '~', '$x^$', '\u202ea', '\ud800', 'COM1', 'com¹', 'a_b~0123456789ab']


def file_names(keys):
    from mammo_nb.core.file_names import file_names
    return file_names(keys, '.png')


def test_different_ids_have_different_files_on_every_system():
    "`a/b`, `a b` and `a_b` were one file: the last patient's image replaced those of the others"
    keys = [(i, side) for i in IDS for side in 'LR']
    names = file_names(keys)
    folded = {unicodedata.normalize('NFKD', name).casefold() for name in names}
    assert len(folded) == len(keys)
    for name in names:
        assert re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.~-]{0,163}', name), name
        assert name.split('.')[0].upper() not in {'CON', 'PRN', 'AUX', 'NUL', 'COM1', 'LPT1'}


@pytest.mark.parametrize('key, name', [(('E1', 'L'), 'E1-L.png'), (('a_b', 'R'), 'a_b-R.png'), (('1.2.840.7', 'L'), '1.2.840.7-L.png'), (('x-y', 'L'), 'x-y-L.png')])
def test_plain_ids_keep_their_names(key, name):
    assert file_names([key, ('a/b', 'L')])[0] == name


def test_equal_keys_have_one_file_and_parts_are_not_mixed():
    assert len(set(file_names([('a', 'b'), ('a', 'b')]))) == 1
    assert len(set(file_names([('a-b', 'c'), ('a', 'b-c'), ('a-b-c',)]))) == 3


def test_a_name_does_not_depend_on_the_order():
    keys = [(i, 'L') for i in IDS]
    assert dict(zip(keys, file_names(keys))) == dict(zip(keys[::-1], file_names(keys[::-1])))


def test_overlays_of_similar_exams_are_all_written(monkeypatch, tmp_path):
    exams = ['a/b', 'a b', 'a_b', 'A_b', '../a_b']
    cases = pd.DataFrame(dict(exam_id=exams, laterality='L'))
    monkeypatch.setattr(overlay, 'breast_table', lambda cohort, labels: cases)
    monkeypatch.setitem(overlay.OVERLAYS, 'two_view', lambda model, prepared, case: plt.figure(figsize=(1, 1)))
    model = SimpleNamespace(system='two_view')
    n = overlay.write_overlays(model, SimpleNamespace(cohort=None), cases, tmp_path/'a/overlays')
    written = {path.relative_to(tmp_path).as_posix().casefold() for path in tmp_path.rglob('*') if path.is_file()}
    assert n == len(written) == 5 and all(name.startswith('a/overlays/') for name in written)


def test_predicted_images_of_similar_exams_are_all_written(tmp_path):
    exams = ['a/b', 'a b', 'a_b', 'A_b', '../a_b']
    rows = pd.DataFrame(dict(patient_id=exams, exam_id=exams, laterality='L'))
    collector = systems._Collector(SimpleNamespace(rows=rows), SimpleNamespace(name='toy'), 'v1', tmp_path/'images')
    for batch in (2, 3): collector.add(dict(warped=torch.rand(batch, 1, 4, 4)))
    paths = collector.rows_of('warped').path
    assert paths.str.casefold().nunique() == 5
    written = [path.relative_to(tmp_path/'images').as_posix() for path in tmp_path.rglob('*') if path.is_file()]
    assert sorted(written) == sorted(paths)
