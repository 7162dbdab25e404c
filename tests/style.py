"""How a page reads, in counts: a ratchet keeps them from growing.

    python tests/style.py           what the notebooks have now, against tests/style_ratchet.csv
    python tests/style.py --write   write the counts of today

Each rule counts its offences in a notebook. The ratchet lists the notebooks with offences. A count that
grows fails; a count that shrinks fails too, until the list is written again: so the list only gets shorter.
"""
import ast
import csv
import io
import re
import sys
import tokenize

import yaml
from repo import ROOT, exported, module_of, notebooks, read, source

RATCHET = ROOT/'tests'/'style_ratchet.csv'
MAX_LINE, LONG_LINE, DENSE, MAX_ASSERTIONS = 120, 100, 20, 8


def python_of(text):
    "The code of a cell, without directives and magics"
    lines = ['pass' if re.match(r'\s*[!%]', l) else l for l in text.split('\n') if not re.match(r'\s*#\s*\|', l)]
    return '\n'.join(lines)


def tree_of(cell):
    try:
        return ast.parse(python_of(source(cell)))
    except SyntaxError:
        return ast.Module([], [])


def is_assertion(node):
    if isinstance(node, ast.Assert):
        return True
    function = getattr(node, 'func', None)
    name = getattr(function, 'id', getattr(function, 'attr', ''))
    return isinstance(node, ast.Call) and bool(re.match(r'(test_|assert_)', name))


def code_cells(cells):
    return [c for c in cells if c['cell_type'] == 'code']


def exported_lines(cells):
    for cell in code_cells(cells):
        if exported(cell):
            yield from python_of(source(cell)).split('\n')


def semicolons_of(cell):
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(python_of(source(cell))).readline))
    except (tokenize.TokenError, IndentationError):
        return 0
    return sum(t.type == tokenize.OP and t.string == ';' for t in tokens)


def too_long_lines(cells):
    "Exported lines of more than 120 characters"
    return sum(len(line) > MAX_LINE for line in exported_lines(cells))


def long_lines(cells):
    "Exported lines of more than 100 characters"
    return sum(len(line) > LONG_LINE for line in exported_lines(cells))


def semicolons(cells):
    "Semicolons in exported code, and in cells with assertions"
    return sum(semicolons_of(c) for c in code_cells(cells) if exported(c) or any(map(is_assertion, ast.walk(tree_of(c)))))


def crowded_tests(cells):
    "Cells with more than eight assertions"
    return sum(sum(map(is_assertion, ast.walk(tree_of(c)))) > MAX_ASSERTIONS for c in code_cells(cells) if not exported(c))


def dense_functions(cells):
    "Exported functions with more than 20 syntax nodes a line"
    count = 0
    for cell in code_cells(cells):
        if not exported(cell):
            continue
        lines = python_of(source(cell)).split('\n')
        for f in ast.walk(tree_of(cell)):
            if isinstance(f, ast.FunctionDef):
                body = f.body[1:] if ast.get_docstring(f) else f.body
                if body:
                    n = sum(bool(l.strip()) for l in lines[body[0].lineno-1:f.end_lineno])
                    count += sum(1 for s in body for _ in ast.walk(s))/max(n, 1) > DENSE
    return count


def options_of(cell):
    "The `#|` lines of a cell that are written as YAML"
    return [re.sub(r'^\s*#\s*\|\s?', '', l) for l in source(cell).split('\n') if re.match(r'\s*#\s*\|\s*[\w-]+\s*:', l)]


def invalid_options(cells):
    "Cells whose `#|` options are no valid YAML: Quarto stops at them"
    count = 0
    for cell in code_cells(cells):
        try:
            count += not isinstance(yaml.safe_load('\n'.join(options_of(cell))), (dict, type(None)))
        except yaml.YAMLError:
            count += 1
    return count


def has_figure(cell):
    return any('image/png' in o.get('data', {}) for o in cell.get('outputs', []))


def bare_figures(cells):
    "Figures without caption or alternative text"
    count = 0
    for cell in filter(has_figure, code_cells(cells)):
        names = {o.split(':')[0] for o in options_of(cell)}
        count += not {'fig-cap', 'fig-alt'} <= names
    return count


def private_words(cells):
    "Words that are no terms of the field, in prose and exported comments: image, not picture; patient, not woman"
    prose = [source(c) for c in cells if c['cell_type'] == 'markdown']
    texts = prose + [' '.join(re.findall(r'#.*|"[^"\n]*"', source(c))) for c in code_cells(cells) if exported(c)]
    return sum(len(re.findall(r'\b(pictures?|women|woman)\b', re.sub(r'`[^`]*`', '', t), re.I)) for t in texts)


RULES = (too_long_lines, long_lines, semicolons, crowded_tests, dense_functions, invalid_options, bare_figures, private_words)


def counts(root=ROOT):
    "`{(rule, notebook): count}`, without zeros"
    found = {}
    for path in notebooks(root):
        cells = read(path)
        for rule in RULES:
            n = rule(cells)
            if n:
                found[rule.__name__, path.relative_to(root/'nbs').as_posix()] = n
    return found


def ratchet():
    with RATCHET.open(newline='') as f:
        return {(r['rule'], r['notebook']): int(r['count']) for r in csv.DictReader(f)}


def changes(now, before):
    "Sentences about every count that differs"
    for key in sorted({*now, *before}):
        a, b = before.get(key, 0), now.get(key, 0)
        if a != b:
            todo = 'mend it' if b > a else 'write the ratchet again: python tests/style.py --write'
            yield f'{key[1]}: {key[0]} was {a}, is {b}: {todo}'


def main(write):
    now = counts()
    if not write:
        print('\n'.join(changes(now, ratchet())) or 'as the ratchet says')
        return
    with RATCHET.open('w', newline='') as f:
        rows = csv.writer(f, lineterminator='\n')
        rows.writerow(('rule', 'notebook', 'count'))
        rows.writerows((*key, n) for key, n in sorted(now.items()))


if __name__ == '__main__':
    main('--write' in sys.argv)
