"The notebook rules, on every notebook, and every rule on a notebook that breaks it."
import copy
from collections import Counter
import pytest
from notebook_rules import RULES, complaints
from repo import ROOT, notebooks, read

NAMES = [str(p.relative_to(ROOT/'nbs')) for p in notebooks()]

@pytest.mark.parametrize('name', NAMES)
def test_rules(name): assert complaints(name, read(ROOT/'nbs'/name)) == []

def test_one_number_one_notebook():
    seen = Counter((p.parent, p.name[:2]) for p in notebooks() if p.name != 'index.ipynb')
    assert [f'{folder.name}/{n}' for (folder, n), k in seen.items() if k > 1] == []

# ---- the rules themselves

def cell(kind, text, i, outputs=()):
    c = dict(cell_type=kind, id=f'{i:08x}', metadata={}, source=text.splitlines(keepends=True))
    return {**c, 'execution_count': None, 'outputs': list(outputs)} if kind == 'code' else c

def good(function=None, demo='width([2, 5])', title='# Boxes\n\n> How wide a box is, in pixels of the stored image.', export='#| export\nimport numpy as np', outs=None, **swap):
    "A notebook without a fault, parts of it replaced"
    function = function or '#| export\ndef width(\n    box:list # xyxy\n)->int: # pixels\n    "The width of a box"\n    return box[1] - box[0]'
    result = dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': ['3'], 'image/png': 'A'*100})
    parts = [('code', '#| default_exp cohort.boxes'), ('markdown', title), ('markdown', 'word ' * 80), ('code', export), ('code', function),
             ('code', demo, [result] if outs is None else outs), ('code', 'assert width([2, 5]) == 3\nassert width([0, 0]) == 0')]
    for k, v in swap.items(): parts[int(k[1:])] = v
    return [cell(p[0], p[1], i, *p[2:]) for i, p in enumerate(parts)]

def stream(text, name='stdout'): return [dict(output_type='stream', name=name, text=[text])]
def figure(n): return [dict(output_type='display_data', metadata={}, data={'image/png': 'A'*n})]
def function(body, head='def width(\n    box:list # xyxy\n)->int: # pixels\n    "The width of a box"\n'): return f'#| export\n{head}    {body}'

BAD = [
    ('module_is_the_name', good(c0=('code', '#| default_exp cohort.box'))),
    ('module_is_the_name', good(c0=('code', '1'))),
    ('begins', good(c0=('code', '#| default_exp cohort.boxes\nimport os'))),
    ('begins', good(c6=('code', 'assert width([2, 5]) == 3\nassert 1\nimport nbdev; nbdev.nbdev_export()'))),
    ('title', good(title='# Boxes')), ('title', good(title='# Boxes\n> too short')), ('title', good(c2=('markdown', '# Another\n' + 'word '*80))),
    ('first_export_is_imports', good(export='#| export\nx = 1')),
    ('parses', good(demo='width([2,')), ('parses', good(function=function('return (')),),
    ('short_cells', good(function=function('\n    '.join(f'x{i} = {i}' for i in range(41))))),
    ('no_mixed_imports', good(export='#| export\nimport os\nx = 1')),
    ('imports_stand_alone', good(demo='import os\nwidth([2, 5])')), ('imports_stand_alone', good(demo='def f():\n    import os\nx = 1')),
    ('documented', good(function='#| export\ndef width(\n    box:list # xyxy\n): # pixels\n    return box[1]')),
    ('documented', good(function='#| export\ndef width(box):\n    "The width of a box"\n    return box[1]')),
    ('documented', good(function='#| export\ndef width(\n    box:list # xyxy\n):\n    "The width of a box"\n    return box[1]')),
    ('documented', good(function='#| export\nclass Box: x = 1')),
    ('nothing_swallowed', good(function=function('try: return box[1]\n    except ValueError: pass'))),
    ('nothing_swallowed', good(demo='try: width(3)\nexcept: print(1)')),
    ('no_stub', good(function=function('raise NotImplementedError'))),
    ('no_global_filter', good(export="#| export\nimport warnings", demo="warnings.filterwarnings('ignore')")),
    ('no_global_filter', good(demo="from warnings import simplefilter\nsimplefilter('ignore')")),
    ('nothing_hidden', good(demo='#| eval: false\nwidth(1)')), ('nothing_hidden', good(demo='%time width([2, 5])')),
    ('nothing_hidden', good(demo='#| echo: false\nwidth([2, 5])', outs=[])),
    ('clean_outputs', good(outs=[dict(output_type='error', ename='E', evalue='', traceback=[])])),
    ('clean_outputs', good(outs=stream('a warning', 'stderr'))), ('clean_outputs', good(outs=stream('/srv/data/exam/x.dcm'))),
    ('clean_outputs', good(outs=stream('<function f at 0x7f113a0c0400>'))), ('clean_outputs', good(outs=stream(' 50%|#####  | 1/2 [00:01, 1.0it/s]'))),
    ('clean_outputs', good(outs=[dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': {}})])),
    ('small_outputs', good(outs=figure(250_000))), ('small_outputs', good(outs=stream('x'*900_000))),
    ('tells_and_shows', good(c2=('markdown', 'few words'))), ('tells_and_shows', good(c6=('code', '1'))),
    ('tells_and_shows', good(outs=stream('no figure'))), ('tells_and_shows', good(outs=[])),
]

def test_a_good_notebook_passes(): assert complaints('cohort/01_boxes.ipynb', good()) == []

@pytest.mark.parametrize('rule, cells', BAD, ids=[f'{r}-{i}' for i, (r, _) in enumerate(BAD)])
def test_a_bad_notebook_is_seen(rule, cells): assert rule in {c.split(':')[0] for c in complaints('cohort/01_boxes.ipynb', cells)}

@pytest.mark.parametrize('name', ['cohort/boxes.ipynb', 'cohort/1_boxes.ipynb', '01_boxes.ipynb', 'cohort/01_Boxes.ipynb'])
def test_a_bad_name_is_seen(name): assert any(c.startswith('name_is_numbered') for c in complaints(name, good()))

@pytest.mark.parametrize('change', [dict(id='x'), dict(id='00000001'), dict(source='text'), dict(metadata=dict(scrolled=True))])
def test_a_badly_stored_notebook_is_seen(change):
    cells = copy.deepcopy(good())
    cells[0].update(change)
    if change.get('source'): assert [c for c in RULES[-1]('cohort/01_boxes.ipynb', cells)]
    else: assert any(c.startswith('stored_well') for c in complaints('cohort/01_boxes.ipynb', cells))

def test_every_rule_has_a_bad_notebook():
    assert {r.__name__ for r in RULES} == {r for r, _ in BAD} | {'name_is_numbered', 'stored_well'}

def test_a_filter_inside_catch_warnings_is_fine():
    assert complaints('cohort/01_boxes.ipynb', good(demo="with warnings.catch_warnings():\n    warnings.simplefilter('error')\n    width([2, 5])")) == []
