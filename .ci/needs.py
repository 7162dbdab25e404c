"What a notebook needs that not everybody has: `#| needs: radiomics` in one of its cells. Without it the notebook is skipped, and counted."
import json
import re
from importlib.util import find_spec
from pathlib import Path

NEEDS = re.compile(r'^#\s*\|\s*needs:\s*(.+)$', re.M)

def missing_needs(path):
    "Names of modules that a notebook needs and that are not installed"
    try:
        cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    except ValueError:
        return []  # it is run, and fails
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    names = [name for found in NEEDS.findall(code) for name in found.split()]
    return [name for name in names if find_spec(name) is None]
