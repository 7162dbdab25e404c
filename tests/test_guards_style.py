"Pages stay readable: the counts of tests/style.py never grow; names are unique; one import is enough."
import ast
import importlib
from collections import defaultdict

import pytest
import style
from repo import ROOT, exported, module_of, notebooks, read, source

import mammo_nb as mn
from mammo_nb.core.face import face_names


def test_no_count_grows():
    assert list(style.changes(style.counts(), style.ratchet())) == []


def cell(text, kind='code', figure=False):
    outputs = [dict(data={'image/png': 'x'})] if figure else []
    return dict(cell_type=kind, source=[text], outputs=outputs)


@pytest.mark.parametrize('rule, bad', [
    (style.too_long_lines, '#| export\nx = 1' + ' '*130 + '# long'),
    (style.long_lines, '#| export\nx = 1' + ' '*100 + '# long'),
    (style.semicolons, '#| export\na = 1; b = 2'),
    (style.semicolons, 'a = 1; assert a'),
    (style.crowded_tests, '\n'.join(['assert 1']*9)),
    (style.dense_functions, '#| export\ndef f(a): return [b*c+d for b, c, d in a if b > c and c > d or d == b][::2]'),
    (style.invalid_options, '#| fig-alt: Left: a curve: "quoted\nplot()'),
    (style.private_words, '#| export\ndef f(): "A picture"')])
def test_each_rule_sees_a_bad_cell(rule, bad):
    assert rule([cell(bad)]) == 1
    assert rule([cell('#| export\nx = 1')]) == 0


def test_a_figure_needs_caption_and_text():
    assert style.bare_figures([cell('#| fig-cap: "a"\nplot()', figure=True)]) == 1
    assert style.bare_figures([cell('#| fig-cap: "a"\n#| fig-alt: "b"\nplot()', figure=True)]) == 0


def test_the_ratchet_only_gets_shorter():
    key = ('semicolons', 'a.ipynb')
    assert 'mend it' in next(style.changes({key: 2}, {key: 1}))
    assert '--write' in next(style.changes({key: 1}, {key: 2}))
    assert list(style.changes({key: 1}, {key: 1})) == []


def public_names():
    "Public names of exported cells, with the modules that define them"
    found = defaultdict(set)
    for path in notebooks():
        cells = read(path)
        for c in cells:
            if c['cell_type'] == 'code' and exported(c):
                for node in style.tree_of(c).body:
                    patched = any('patch' in ast.dump(d) for d in getattr(node, 'decorator_list', ()))
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched and not node.name.startswith('_'):
                        found[node.name].add(module_of(cells))
                    made = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)  # by a function, such as `rival_learner`
                    if made and isinstance(node.targets[0], ast.Name) and node.targets[0].id.endswith('_learner'):
                        found[node.targets[0].id].add(module_of(cells))
    return found


def test_a_name_belongs_to_one_module():
    assert {name: modules for name, modules in public_names().items() if len(modules) > 1} == {}


@pytest.mark.parametrize('name', sorted(face_names()))
def test_every_short_name_is_on_a_page(name):
    module, own = face_names()[name]
    assert module.removeprefix('mammo_nb.') in public_names()[own]
    assert getattr(mn, name) is getattr(importlib.import_module(module), own)


def test_the_face_is_a_hand_full():
    assert 40 <= len(face_names()) <= 75
    assert set(face_names()) <= set(dir(mn))
