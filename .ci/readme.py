"""README.md from nbs/index.ipynb, without Quarto: `make readme`; `--check` only says whether it is in sync.

Markdown stays as it is, code is fenced unless `#| echo: false` or `#| hide`, a figure becomes nbs/images/index-<n>.png with the cell's
`#| fig-alt` as its text. Links to notebooks get the folder in front, so that they work on the front page of the repository.
"""
import argparse, base64, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARNING = '<!-- Generated from nbs/index.ipynb by `make readme`: do not edit -->\n'

def directive(s, name):
    m = re.search(rf'^#\s*\|\s*{name}\b:?[ \t]*(.*)$', s, re.M)
    return m and m[1].strip()

def relink(text):
    "Links to pages beside the index, seen from the top folder; attributes of figures are for Quarto only"
    text = re.sub(r'!\[[^\]]*\]\(([^)]*)\)\{fig-alt="([^"]*)"\}', r'![\2](\1)', text)
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+\))', r'\1nbs/\2', text)

def text_of(v): return ''.join(v) if isinstance(v, list) else v

def cell_markdown(c, images):
    s = ''.join(c['source'])
    if c['cell_type'] == 'markdown':
        yield relink(s)
        return
    if c['cell_type'] != 'code' or directive(s, 'hide') is not None: return
    body = '\n'.join(l for l in s.splitlines() if not re.match(r'#\s*\|', l)).strip()
    if directive(s, 'echo') != 'false': yield f'```python\n{body}\n```'
    for o in c['outputs']:
        data = o.get('data', {})
        if 'image/png' in data:
            name = f'index-{len(images)+1}.png'
            images[name] = base64.b64decode(text_of(data['image/png']))
            yield f'![{directive(s, "fig-alt") or ""}](nbs/images/{name})'
        elif text := text_of(o.get('text') or data.get('text/markdown') or data.get('text/plain') or ''): yield f'```\n{text.rstrip()}\n```'

def make():
    "All files, `{path: bytes}`"
    cells = json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    images = {}
    parts = [m for c in cells for m in cell_markdown(c, images)]
    text = WARNING + '\n' + '\n\n'.join(p.strip() for p in parts) + '\n'
    return {'README.md': text.encode(), **{f'nbs/images/{k}': v for k, v in images.items()}}

def stale():
    "What is not as `make` says: changed, missing, or an image that no cell makes any more"
    want = make()
    bad = [k for k, v in want.items() if not (ROOT/k).exists() or (ROOT/k).read_bytes() != v]
    return bad + [f'nbs/images/{p.name}' for p in sorted((ROOT/'nbs/images').glob('index-*.png')) if f'nbs/images/{p.name}' not in want]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--check', action='store_true')
    a, bad = p.parse_args(), stale()
    if a.check:
        print('README.md is in sync' if not bad else 'not in sync with nbs/index.ipynb: ' + ', '.join(bad) + '; run make readme')
        return bool(bad)
    want = make()
    for k in bad:
        if k in want:
            (ROOT/k).parent.mkdir(parents=True, exist_ok=True)
            (ROOT/k).write_bytes(want[k])
        else: (ROOT/k).unlink()
    (ROOT/'README.md').touch()  # newer than the notebook: nbdev_docs then leaves it alone
    print('\n'.join(f'wrote {k}' if k in want else f'removed {k}' for k in bad) or 'README.md is in sync')

if __name__ == '__main__': sys.exit(main())
