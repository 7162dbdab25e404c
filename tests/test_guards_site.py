"""The site: one place for its settings, every page in the sidebar, links that lead somewhere, figures with text.

Where Quarto is on the PATH, a few pages are rendered and looked at (a minute); `make docs` renders all, and
`tests/site_check.py` looks at what it made.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from repo import ROOT, copy_tree, files, nbdev, notebooks, read
from site_check import Page, faults

QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text())


def load_docs():
    spec = spec_from_file_location('docs', ROOT/'.ci/docs.py')
    docs = module_from_spec(spec)
    spec.loader.exec_module(docs)
    return docs


DOCS = load_docs()

# ---- the sidebar

def sections(contents):
    "The lists of pages and patterns in a sidebar"
    if isinstance(contents, str):
        yield [contents]
        return
    here = [item for item in contents if isinstance(item, str)]
    if here:
        yield here
    for item in contents:
        if isinstance(item, dict):
            yield from sections(item.get('contents', []))

def sidebar_faults(contents, there):
    "Pages that the sidebar does not reach, entries without page, sections that are out of order"
    entries = [entry for section in sections(contents) for entry in section]
    reached = {page for entry in entries for page in there if fnmatch(page, entry) and page.count('/') == entry.count('/')}
    yield from (f'not in the sidebar: {p}' for p in sorted(set(there) - reached))
    for entry in entries:
        if not any(fnmatch(page, entry) for page in there):
            yield f'in the sidebar, but there is no such page: {entry}'
    for section in sections(contents):
        yield from (f'twice in a section: {e}' for e in sorted(set(section)) if section.count(e) > 1)

def site_pages():
    nbs = ROOT/'nbs'
    return [str(p.relative_to(nbs)) for p in notebooks()] + [n.removeprefix('nbs/') for n in files() if n.startswith('nbs/') and n.endswith('.qmd')]

def test_every_page_is_in_the_sidebar():
    assert list(sidebar_faults(QUARTO['website']['sidebar']['contents'], site_pages())) == []

@pytest.mark.parametrize('contents, fault', [
    (['a/01_x.ipynb'], 'not in the sidebar: a/02_y.ipynb'),
    (['a/*.ipynb', 'a/03_z.ipynb'], 'no such page: a/03_z.ipynb'),
    ([{'section': 'b', 'contents': 'b/*.ipynb'}, 'a/*.ipynb'], 'no such page: b/*.ipynb'),
    (['a/01_x.ipynb', 'a/01_x.ipynb', 'a/02_y.ipynb'], 'twice')])
def test_a_bad_sidebar_is_seen(contents, fault):
    assert any(fault in f for f in sidebar_faults(contents, ['a/01_x.ipynb', 'a/02_y.ipynb']))

def test_the_sidebar_begins_with_what_a_reader_needs():
    names = [item['section'] for item in QUARTO['website']['sidebar']['contents']]
    assert names == ['Start', 'Tutorials', 'Concepts', 'Systems', 'API', 'Internals']

def test_one_place():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml'
    assert not (ROOT/'nbs/sidebar.yml').exists() and QUARTO['metadata-files'] == ['nbdev.yml']
    generated = {'title', 'site-url', 'description', 'repo-branch', 'repo-url'}  # settings.ini says these, through nbs/nbdev.yml
    assert not generated & set(QUARTO['website']) and 'output-dir' not in QUARTO['project']

def test_no_clinical_use_on_every_page(): assert 'not for clinical use' in QUARTO['website']['page-footer']['center']

# ---- links

FENCE = re.compile(r'^(```|~~~).*?^\1', re.S | re.M)
LINK = re.compile(r'!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|^\[[^\]]+\]:\s*(\S+)', re.M)

def slug(heading):
    "The anchor that Pandoc makes of a heading"
    s = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    s = re.sub(r'[^\w\s.-]', '', s)
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', s.strip())) or 'section'

def markdown(path):
    if path.suffix == '.ipynb': return '\n\n'.join(''.join(c['source']) for c in read(path) if c['cell_type'] == 'markdown')
    return path.read_text(encoding='utf-8')

def anchors(path): return {slug(h) for h in re.findall(r'^#{1,6}\s+(.+?)\s*$', FENCE.sub('', markdown(path)), re.M)} | set(re.findall(r'\{#([\w-]+)', markdown(path)))

def dead_links(path, root):
    bare = re.sub(r'(`+)(?!`).+?(?<!`)\1(?!`)', '', FENCE.sub('', markdown(path)))
    for m in LINK.finditer(bare):
        target = m[1] or m[2]
        if re.match(r'[a-z][a-z0-9+.-]*:', target): continue
        name, _, anchor = target.partition('#')
        to = (path.parent/name).resolve() if name else path
        if not to.exists() or not to.is_relative_to(root): yield f'{path.relative_to(root)}: {target}: no such file'
        elif anchor and to.suffix in ('.ipynb', '.md', '.qmd') and anchor not in anchors(to): yield f'{path.relative_to(root)}: {target}: no such heading'

def own_addresses(path, root):
    "Links to our own repository on the web: the file must be there too"
    cfg = (root/'settings.ini').read_text()
    url = re.search(r'^git_url = (\S+)', cfg, re.M)[1]
    for m in re.finditer(re.escape(url) + r'/(?:blob|tree)/main/([\w./-]+)', markdown(path)):
        if not (root/m[1]).exists(): yield f'{path.relative_to(root)}: {m[0]}: no such file'

def pages_with_links(): return [ROOT/n for n in files() if n.endswith(('.md', '.qmd')) or (n.startswith('nbs/') and n.endswith('.ipynb'))]

def test_every_internal_link_is_alive():
    assert [d for p in pages_with_links() for d in (*dead_links(p, ROOT), *own_addresses(p, ROOT))] == []

@pytest.mark.parametrize('text, dead', [
    ('[a](b.md)', 0), ('[a](c.md)', 1), ('[a](b.md#two-words)', 0), ('[a](b.md#three-words)', 1), ('[a](#here)', 0), ('[a](#there)', 1), ('![p](p.png)', 1),
    ('`[a](c.md)`', 0), ('```\n[a](c.md)\n```', 0), ('[a](https://x.org/c.md)', 0), ('[a]: c.md', 1), ('[a](../../outside.md)', 1)])
def test_a_dead_link_is_seen(tmp_path, text, dead):
    (tmp_path/'b.md').write_text('# B\n## Two words\n')
    (tmp_path/'a.md').write_text('# Here\n' + text)
    assert len(list(dead_links(tmp_path/'a.md', tmp_path))) == dead

@pytest.mark.parametrize('heading, anchor', [('Why', 'why'), ('Where a pixel is', 'where-a-pixel-is'), ('1. `read_mammogram`: presets', 'read_mammogram-presets'), ('What, and why?', 'what-and-why')])
def test_slug(heading, anchor): assert slug(heading) == anchor

# ---- nbdev

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "nbdev_proc_nbs in a copy. It only looks whether Quarto is there (and would install it otherwise), so a name on the PATH is enough"
    bin, tree = tmp_path_factory.mktemp('bin'), copy_tree(tmp_path_factory.mktemp('site'))
    (bin/'quarto').write_text('#!/bin/sh\necho "quarto was called" >&2; exit 1\n')
    (bin/'quarto').chmod(0o755)
    return tree, nbdev('nbdev_proc_nbs', '--n_workers', '2', cwd=tree, path=[bin], home=tmp_path_factory.mktemp('home'))

def test_proc_nbs_runs_clean(processed):
    tree, r = processed
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stderr.strip() == '' and r.stdout.strip() == ''

def test_every_page_is_processed(processed):
    tree, _ = processed
    for page in [p for p in site_pages() if p.endswith('.ipynb')]:
        first = json.loads((tree/'_proc'/page).read_text())['cells'][0]
        head = yaml.safe_load(''.join(first['source']).strip().strip('-'))
        assert first['cell_type'] == 'raw' and head['title'] and len(head['description']) >= 20, page

def test_the_settings_arrive(processed):
    tree, _ = processed
    arrived = tree/'_proc/_quarto.yml'
    assert yaml.safe_load(arrived.read_text()) == QUARTO
    title = yaml.safe_load((tree/'nbs/nbdev.yml').read_text())
    assert title['website']['title'] == 'mammo_nb' and title['project']['output-dir'] == '_docs'
    assert (tree/'_proc/nbdev.yml').exists() and (tree/'_proc/styles.css').exists()

# ---- what is mended between nbdev and Quarto

ADDRESS = 'https://site.org/lib/'

@pytest.mark.parametrize('text, mended', [
    ('see [`f`](https://site.org/lib/a/f.html#f)', 'see [`f`](../a/f.html#f)'),
    ('[the [`f`](https://x.org/f) page](f.ipynb)', '[the `f` page](f.ipynb)'),
    ('[[`f`](https://x.org/f)](f.ipynb)', '[`f`](f.ipynb)'),
    ('[a](b.ipynb) and [`f`](https://x.org/f)', '[a](b.ipynb) and [`f`](https://x.org/f)'),
    ('```python\ndef g(\n  x, # see [`f`](https://x.org/f)\n```', '```python\ndef g(\n  x, # see `f`\n```'),
    ('## Use [`f`](https://x.org/f)', '## Use `f`'),
    ('a [`_private`](https://x.org/f)', 'a `_private`'),
    ('a [`C.__init__`](https://x.org/f)', 'a [`C.__init__`](https://x.org/f)'),
    ('`x[0](1)`', '`x[0](1)`')])
def test_what_quarto_cannot_read_is_mended(text, mended):
    assert DOCS.mend(text, 'b/01_page.ipynb', ADDRESS) == mended

def test_a_page_names_its_module():
    cells = [dict(source=['#| default_exp core.errors'])]
    assert '`mammo_nb.core.errors`' in DOCS.module_line(cells)
    assert DOCS.module_line([dict(source='x = 1')]) is None

# ---- the rendered site

PAGE = '<html><body><a href="b.html#there">b</a><main>{}</main></body></html>'
FIGURE = '<figure><img src="p.png" alt="A drawing"><figcaption>A drawing</figcaption></figure>'

@pytest.mark.parametrize('body, fault', [
    (FIGURE, None),
    ('<p>[a](b.html)</p>', 'raw Markdown'),
    ('<p>::: {.note}</p>', 'raw Markdown'),
    ('<pre><code># see [`f`](https://x.org)</code></pre>', 'link in code'),
    ('<code>x[0](1)</code>', None),
    ('<a href="c.html">c</a>', 'dead link c.html'),
    ('<a href="b.html#nowhere">b</a>', 'dead anchor b.html#nowhere'),
    ('<img src="p.png" alt="A drawing">', 'no caption'),
    (FIGURE.replace('A drawing"', '"'), 'no alternative text'),
    ('<table><tr><td>...</td></tr></table>', 'ellipsis')])
def test_a_fault_of_the_site_is_seen(tmp_path, body, fault):
    (tmp_path/'a.html').write_text(PAGE.format(body))
    (tmp_path/'b.html').write_text('<html><body><h2 id="there">b</h2></body></html>')
    found = list(faults(tmp_path))
    assert found == [] if fault is None else any(fault in f for f in found)

RENDERED = ('index.ipynb', 'core/01_errors.ipynb', 'start/10_references.qmd')

@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not on the PATH; make docs says where to get it')
def test_pages_render(processed):
    "Links to pages that are not rendered here are dead, so only the rest is looked at"
    tree, _ = processed
    DOCS.mend_pages(tree)
    for page in RENDERED:
        subprocess.run(['quarto', 'render', page, '--to', 'html'], cwd=tree/'_proc', check=True, capture_output=True)
    site = tree/'_proc'/'_docs'
    assert [f for f in faults(site) if 'dead ' not in f] == []
    assert 'inputerror' in Page((site/'core/errors.html').read_text()).ids
