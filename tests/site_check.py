"""What is wrong with the rendered site, a line each: `python tests/site_check.py [_docs]`.

Links and anchors that lead nowhere, Markdown that was not rendered, figures without text, tables that were cut.
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

VOID = {'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'track', 'wbr'}
UNSEEN = {'script', 'style', 'template'}
RAW_MARKDOWN = re.compile(r'\]\(|\]\[|:::|\{target=|(?:^|\s)\*\*\S')
RAW_LINK = re.compile(r'`\]\((?:https?:|\.\./)')  # what nbdev makes of a name in a signature


class Page(HTMLParser):
    "Anchors, links, figures and visible text of a page"

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images = [], set(), [], []
        self.texts, self.codes, self.cells, self.captions = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {v for k, v in attrs.items() if k in ('id', 'name', 'data-anchor-id') and v}
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])
        if tag == 'img' and 'main' in self.open:
            self.images.append((attrs.get('src', ''), attrs.get('alt') or '', 'figure' in self.open))
        if tag == 'figcaption':
            self.captions += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if 'main' not in self.open or UNSEEN & set(self.open):
            return
        if {'code', 'pre'} & set(self.open):
            self.codes.append(data)
        else:
            self.texts.append(data)
        if {'td', 'th'} & set(self.open):
            self.cells.append(data.strip())


def shortened(text):
    return ' '.join(text.split())[:80]


def link_faults(name, page, pages, folder):
    "Internal links that lead to no file or to no anchor"
    for href in page.links:
        parts = urlsplit(href)
        if parts.scheme or parts.netloc:
            continue
        target = (folder/name).parent/unquote(parts.path) if parts.path else folder/name
        target = target/'index.html' if target.is_dir() else target
        key = target.resolve()
        if not key.exists():
            yield f'{name}: dead link {href}'
        elif parts.fragment and key in pages and unquote(parts.fragment) not in pages[key].ids:
            yield f'{name}: dead anchor {href}'


def text_faults(name, page):
    "Markdown that is still Markdown, and tables with columns or rows left out"
    for text in page.texts:
        found = RAW_MARKDOWN.search(text)
        if found:
            yield f'{name}: raw Markdown: {shortened(text[max(0, found.start()-20):])}'
    for text in page.codes:
        found = RAW_LINK.search(text)
        if found:
            yield f'{name}: link in code: {shortened(text[max(0, found.start()-20):])}'
    if {'...', '…'} & set(page.cells):
        yield f'{name}: a table is cut with an ellipsis'


def figure_faults(name, page):
    "Figures without alternative text or without caption"
    for source, alt, in_figure in page.images:
        if not alt.strip():
            yield f'{name}: no alternative text: {source[-60:]}'
        if not in_figure:
            yield f'{name}: no caption: {source[-60:]}'


def faults(folder):
    "Everything that is wrong with a rendered site"
    folder = Path(folder).resolve()
    files = sorted(p for p in folder.rglob('*.html') if 'site_libs' not in p.parts)
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in files}
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        yield from link_faults(name, page, pages, folder)
        yield from text_faults(name, page)
        yield from figure_faults(name, page)


if __name__ == '__main__':
    found = list(faults(sys.argv[1] if len(sys.argv) > 1 else '_docs'))
    print('\n'.join(found) or 'the site has no fault')
    sys.exit(bool(found))
