"A module imports only from its own floor or below."
import pytest
from repo import FLOORS, ROOT, upward

def test_no_upward_import(): assert list(upward(ROOT/'mammo_nb')) == []

def tree(tmp_path, modules):
    "A fake package: `{path: text}`"
    lib = tmp_path/'mammo_nb'
    for name in ('core', 'cohort', 'models', 'cli'): (lib/name).mkdir(parents=True)
    for name, text in modules.items():
        (lib/name).parent.mkdir(parents=True, exist_ok=True)
        (lib/name).write_text(text)
    return lib

@pytest.mark.parametrize('text', [
    'from mammo_nb.models.blocks import Block', 'import mammo_nb.models.blocks as b', 'from mammo_nb import models', 'from ..models import blocks',
    'from ..models.blocks import Block', 'from .. import models', 'def f():\n    from ..models.blocks import Block', 'try:\n    import mammo_nb.cli\nexcept ImportError: raise'])
def test_every_way_up_is_seen(tmp_path, text):
    found = list(upward(tree(tmp_path, {'cohort/exams.py': text})))
    assert len(found) == 1 and found[0].startswith('cohort/exams.py:') and 'higher floor' in found[0]

def test_up_from_a_deeper_folder(tmp_path):
    lib = tree(tmp_path, {'cohort/datasets/cbis.py': 'from ...models.blocks import Block\nfrom ..dicom import read\nfrom ...core.errors import InputError'})
    assert len(list(upward(lib))) == 1

def test_down_and_sideways_are_fine(tmp_path):
    lib = tree(tmp_path, {'models/a.py': 'from ..cohort.exams import x\nfrom .b import y\nimport torch', 'cli/c.py': 'from mammo_nb.models.a import y\nimport mammo_nb'})
    assert list(upward(lib)) == []

def test_a_new_folder_needs_a_floor(tmp_path): assert list(upward(tree(tmp_path, {'attic/a.py': 'x=1'}))) == ['attic/a.py: the folder attic has no floor']
def test_the_package_itself_imports_only_the_core(tmp_path):
    assert list(upward(tree(tmp_path/'core', {'__init__.py': 'from .core.face import x'}))) == []
    assert len(list(upward(tree(tmp_path/'up', {'__init__.py': 'from .models.blocks import x'})))) == 1

def test_every_pair_of_floors(tmp_path):
    pairs = [(a, b) for i, lows in enumerate(FLOORS) for highs in FLOORS[i+1:] for a in lows for b in highs]
    for low, high in pairs:
        up = tree(tmp_path/f'up-{low}-{high}', {f'{low}/a.py': f'from ..{high}.b import x', f'{high}/b.py': 'x = 1'})
        down = tree(tmp_path/f'down-{low}-{high}', {f'{high}/a.py': f'from ..{low}.b import x', f'{low}/b.py': 'x = 1'})
        assert len(list(upward(up))) == 1 and not list(upward(down)), (low, high)
    assert len(pairs) > 40
