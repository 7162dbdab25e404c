"""The site, in `_docs`: `make docs`.

nbdev turns the notebooks into pages for Quarto (`_proc`), `mend` corrects what Quarto cannot read, and Quarto renders
them. A list of pages renders only these, for a quick look: `.venv/bin/python .ci/docs.py index.ipynb`.
"""
import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INNER = re.compile(r'\[(`[^`\]]+`)\]\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*\)')  # what nbdev makes of a name in backticks
OUTER = re.compile(rf'(?<!\\)\[(?P<text>(?:[^\[\]\n]|\n(?!\n)|{INNER.pattern})*)\](?=\()')


def settings(root=ROOT):
    "The values of settings.ini"
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini')
    return config['DEFAULT']


def site_address(root=ROOT):
    "Where the site is published: nbdev begins its links with it"
    values = settings(root)
    return values['doc_host'] + values['doc_baseurl'] + '/'


# ---- Markdown

def unlink(text):
    "Names instead of links to names"
    return INNER.sub(r'\1', text)


def unlink_private(text):
    "No links to private names: they have no place on a page"
    return INNER.sub(lambda m: m[1] if re.search(r'[`.]_(?!_)', m[1]) else m[0], text)


def unnest_links(text):
    "Keep the outer one of two links: `[the [`name`](a) page](b)` has the text of `name`"
    return OUTER.sub(lambda m: f'[{unlink(m["text"])}]' if INNER.search(m['text']) else m[0], text)


def relative_links(text, page, address):
    "Links to pages of the site, as seen from a page"
    up = '../'*(len(Path(page).parts) - 1)
    return text.replace(f']({address}', f']({up}')


def mend_lines(text):
    "No links inside code fences, where they would be shown as they are written, nor in headings"
    fenced = False
    for line in text.split('\n'):
        fence = line.lstrip().startswith(('```', '~~~'))
        fenced ^= fence
        yield unlink(line) if fence or fenced or line.startswith(('#', '>')) else line


def mend(text, page, address):
    "Markdown as nbdev leaves it -> Markdown as Quarto reads it"
    text = unlink_private('\n'.join(mend_lines(text)))
    return relative_links(unnest_links(text), page, address)


# ---- notebooks

def joined(text):
    return ''.join(text) if isinstance(text, list) else text


def lines_of(text):
    "Text as notebooks store it; Quarto reads one long string as one line"
    return text.splitlines(keepends=True)


def module_line(cells):
    "The import of the module that a page explains, or nothing"
    for cell in cells:
        found = re.search(r'^#\|\s*default_exp\s+([\w.]+)', joined(cell['source']), re.M)
        if found:
            return f'::: {{.module-name}}\n`{settings()["lib_name"]}.{found[1]}`\n:::'


def mend_page(path, page, source, address):
    "Correct a processed notebook in its place"
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = lines_of(mend(joined(cell['source']), page, address))
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'text/markdown' in data:
                data['text/markdown'] = lines_of(mend(joined(data['text/markdown']), page, address))
    module = module_line(json.loads(source.read_text(encoding='utf-8'))['cells'])
    if module:
        after_front_matter = 1 + (notebook['cells'][0]['cell_type'] == 'raw')
        notebook['cells'].insert(after_front_matter, dict(cell_type='markdown', id='module', metadata={}, source=lines_of(module)))
    path.write_text(json.dumps(notebook), encoding='utf-8')


def mend_pages(root):
    address = site_address(root)
    for path in sorted((root/'_proc').rglob('*.ipynb')):
        page = path.relative_to(root/'_proc')
        if (root/'nbs'/page).exists():
            mend_page(path, page.as_posix(), root/'nbs'/page, address)


# ---- the site

def run(*command, cwd):
    "Run a command of this environment; its output is ours"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    subprocess.run(command, cwd=cwd, check=True, env={**os.environ, 'PATH': path})


def process(root):
    "Pages for Quarto, in `_proc`, always from nothing: what a failed run left would break the next one"
    shutil.rmtree(root/'_proc', ignore_errors=True)
    run('nbdev_proc_nbs', '--n_workers', str(min(4, os.cpu_count() or 1)), cwd=root)
    mend_pages(root)


def render(root, pages=()):
    "The site, or only some of its pages, in `_docs`"
    for page in pages or ['.']:
        run('quarto', 'render', page, '--to', 'html', '--no-cache', cwd=root/'_proc')
    if not pages:
        shutil.rmtree(root/'_docs', ignore_errors=True)
    shutil.copytree(root/'_proc'/'_docs', root/'_docs', dirs_exist_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', help='pages below nbs to render, e.g. core/01_errors.ipynb; none: all')
    pages = parser.parse_args().pages
    try:
        process(ROOT)
        render(ROOT, pages)
    except subprocess.CalledProcessError as e:
        sys.exit(f'make docs: {" ".join(e.cmd)} failed, see above')


if __name__ == '__main__':
    main()
