"""Re-executes notebooks and stores their outputs: `make notebooks [NB=nbs/dicom/01_mammogram.ipynb]`.

Outputs are stored only if every cell ran, nothing went to stderr and the size limits hold; otherwise the notebook is left
as it was and the exit status is 1. Cells tagged `#| eval: false` are not run.

The kernel gets one thread, a fixed hash seed and no network, so that a second run stores the same bytes. `--check` stores nothing
and says which notebooks would change.
"""
import argparse, base64, copy, io, json, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbformat
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from execnb.nbio import read_nb, write_nb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'.ci'))
from needs import missing_needs

MAX_FIGURE, MAX_OUTPUTS, MAX_TUTORIAL = 150_000, 800_000, 2_000_000

def notebooks(nbs, names):
    if names: return [Path(n).resolve() for n in names]
    return [p for p in sorted(nbs.rglob('*.ipynb')) if not any(o.startswith(('_', '.')) for o in p.relative_to(nbs).parts)]

GREYS, COLOURED = 64, 8 # levels of grey in a palette; a pixel is coloured if its channels differ by more

def mixed_palette(original, colours):
    "Even levels of grey, and the colours that the coloured pixels of an image [h,w,3] need: [n,3]"
    levels = np.linspace(0, 255, GREYS).round().astype(np.uint8)
    palette = np.repeat(levels[:, None], 3, axis=1)
    coloured = original[np.ptp(original.astype(int), axis=2) > COLOURED]
    if not len(coloured): return palette
    strip = Image.fromarray(coloured[None]).quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    own = np.array(strip.getpalette()[:3*colours], np.uint8).reshape(-1, 3)
    return np.concatenate([palette, own])

def nearest(original, palette):
    "The place in a palette of the nearest colour to each pixel [h,w]"
    packed = original.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    values, inverse = np.unique(packed, return_inverse=True)
    colours = np.stack([values >> 16, values >> 8 & 255, values & 255], 1)
    found = cKDTree(palette.astype(float)).query(colours.astype(float))[1]
    return found.astype(np.uint8)[inverse].reshape(packed.shape)

def as_palette(png):
    "A figure as a palette PNG, with as few colours as show it faithfully, thin coloured lines too, if that is smaller"
    original = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'))
    for colours in (32, 64, 128, 192):
        palette = mixed_palette(original, colours)
        reduced = nearest(original, palette)
        error = np.abs(palette[reduced].astype(int) - original).max(2)
        if np.quantile(error, .999) <= 24: break
    if np.quantile(error, .99) > 24: return png
    image = Image.fromarray(reduced, 'P')
    image.putpalette(palette.tobytes())
    out = io.BytesIO()
    image.save(out, 'PNG', optimize=True)
    small = base64.b64encode(out.getvalue()).decode()
    return small if len(small) < len(png) else png

def tidy(outputs):
    "Without what changes from run to run: execution counts, object addresses, split streams"
    merged = []
    for o in outputs:
        o.pop('execution_count', None)
        if o.output_type == 'execute_result': o.execution_count = None
        if o.output_type == 'stream' and merged and merged[-1].get('name') == o.name: merged[-1].text += o.text
        else: merged.append(o)
    for o in merged:
        if 'image/png' in o.get('data', {}): o['data']['image/png'] = as_palette(o['data']['image/png'])
        for box, key in [(o, 'text')] + [(o.get('data', {}), k) for k in ('text/plain', 'text/html')]:
            if isinstance(box.get(key), str): box[key] = re.sub(r' at 0x[0-9a-f]+', '', box[key])
    return merged

def complaints(path, outputs):
    size = len(json.dumps(outputs))
    limit = MAX_TUTORIAL if 'tutorials' in path.parts else MAX_OUTPUTS
    if size > limit: yield f'outputs are {size:,} bytes (limit {limit:,})'
    for i, outs in enumerate(outputs):
        for o in outs:
            if o.get('name') == 'stderr': yield f'cell {i} writes to stderr: {o["text"][:500]}'
            n = len(o.get('data', {}).get('image/png', ''))*3//4
            if n > MAX_FIGURE: yield f'cell {i}: a figure of {n:,} bytes (limit {MAX_FIGURE:,})'

def environment():
    "What the kernels see, whoever starts them"
    threads = {k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')}
    return {**threads, 'IN_TEST': '1', 'PYTHONHASHSEED': '0', 'HF_HUB_OFFLINE': '1', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
            'COLUMNS': '100', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/".ci/offline"}', 'PYTHONDONTWRITEBYTECODE': '1'}

def execute(path, timeout, check=False):
    start, nb = time.time(), nbformat.read(path, as_version=4)
    run = copy.deepcopy(nb)
    for c in run.cells:
        if re.search(r'^#\s*\|\s*eval: *false', c.source, re.M): c.source = ''
    client = NotebookClient(run, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
                            extra_arguments=['--log-level=ERROR']) # a local TCP kernel warns on every start that it is not encrypted
    try: client.execute()
    except CellExecutionError as e: return path, [re.sub(r'\x1b\[[\d;]*m', '', str(e))[-3000:]], time.time()-start
    except Exception as e: return path, [f'{type(e).__name__}: {e}'], time.time()-start
    outs = [tidy(c.outputs) if c.cell_type == 'code' else [] for c in run.cells]
    bad = list(complaints(path, outs))
    if not bad:
        target = path.with_name(f'.{path.name}.new') # complete before it takes the place of the old one
        for c, o in zip(nb.cells, outs):
            if c.cell_type == 'code': c.outputs, c.execution_count = o, None
        nbformat.write(nb, target)
        nb2 = read_nb(target)
        clean_nb(nb2, clean_ids=False)
        write_nb(nb2, target)
        if check:
            if target.read_bytes() != path.read_bytes(): bad = [f'would change: {", ".join(changed(path, target)) or "the way it is stored"}']
            target.unlink()
        else: target.replace(path)
    return path, bad, time.time()-start

def changed(old, new):
    "The cells whose outputs differ"
    a, b = (json.loads(p.read_text())['cells'] for p in (old, new))
    return [f'cell {i}' for i, (x, y) in enumerate(zip(a, b)) if x != y]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('names', nargs='*')
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--timeout', type=int, default=600)
    p.add_argument('--check', action='store_true', help='store nothing')
    a = p.parse_args()
    os.environ.update(environment())
    failed, paths = 0, notebooks(Path(get_config().nbs_path), a.names)
    for path in paths:
        if missing := missing_needs(path): print(f'skipped           {path.name}: {", ".join(missing)} not installed', flush=True)
    paths = [path for path in paths if not missing_needs(path)]
    with ThreadPoolExecutor(a.workers) as pool:
        for path, bad, secs in pool.map(lambda n: execute(n, a.timeout, a.check), paths):
            print(f'{"FAILED" if bad else "ok":6} {secs:6.1f} s  {path.name}', *bad, sep='\n    ' if bad else '', flush=True)
            failed += bool(bad)
    return min(failed, 1)

if __name__ == '__main__': sys.exit(main())
