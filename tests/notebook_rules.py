"The rules for a notebook, each a function that yields what is wrong; `test_guards_notebooks.py` shows every one of them a bad notebook."
import ast, json, re
from repo import directives, exported, module_of, source

MAX_LINES, MAX_FIGURE, MAX_OUTPUTS, MAX_TUTORIAL = 40, 150_000, 800_000, 2_000_000
FIGURE_ROOMS = ('dicom', 'cohort', 'preparation', 'gaze', 'insilico', 'samples', 'registration', 'models', 'metrics', 'learners')
MACHINE_PATH = re.compile(r'(?<![\w.:/])/(?:[\w.-]+/){2,}[\w.-]+')

def code(cells): return [(i, c) for i, c in enumerate(cells) if c['cell_type'] == 'code']
def text_of(value): return ''.join(value) if isinstance(value, list) else str(value)
def parse(s): return ast.parse(re.sub(r'^\s*[%!].*$', '', s, flags=re.M))
def trees(cells, only_exported=False):
    for i, c in code(cells):
        if only_exported and not exported(c): continue
        try: yield i, c, parse(source(c))
        except SyntaxError: continue  # reported by `parses`

def outputs(cells):
    "Every output with its cell and all its text"
    for i, c in code(cells):
        for o in c.get('outputs', []):
            texts = [text_of(o.get('text', ''))] + [text_of(v) for k, v in o.get('data', {}).items() if k.startswith('text/')]
            yield i, o, '\n'.join(texts)

def name_is_numbered(rel, cells):
    if rel != 'index.ipynb' and not re.fullmatch(r'(?:[a-z]\w*/)+\d\d_[a-z][a-z0-9_]*\.ipynb', rel): yield 'its name is not folder/NN_name.ipynb'

def module_is_the_name(rel, cells):
    module, wanted = module_of(cells), re.sub(r'(^|/)\d\d_', r'\1', rel.removesuffix('.ipynb')).replace('/', '.')
    if module and module != wanted: yield f'exports to {module}, not to {wanted}'
    if not module and any(exported(c) for _, c in code(cells)): yield 'exports cells but has no default_exp'

def begins(rel, cells):
    for i, c in code(cells):
        if 'nbdev_export()' in source(c): yield f'cell {i}: exports when a reader runs all cells; make export does it'
    if not module_of(cells): return
    if re.sub(r'\s', '', source(cells[0])) != f'#|default_exp{module_of(cells)}': yield 'the first cell is not `#| default_exp` alone'

def title(rel, cells):
    md = [source(c) for c in cells if c['cell_type'] == 'markdown']
    head = cells[1] if module_of(cells) and len(cells) > 1 else cells[0]
    if head['cell_type'] != 'markdown' or not re.match(r'# \S.*\n+> \S.{18,}', source(head)):
        yield 'no title cell: `# Title`, then `> One sentence.` (20 characters at least)'
    bare = [re.sub(r'```.*?```', '', s, flags=re.S) for s in md]
    n = sum(len(re.findall(r'^# \S', s, re.M)) for s in bare)
    if n > 1: yield f'{n} H1 titles'

def first_export_is_imports(rel, cells):
    first = next(((i, t) for i, c, t in trees(cells, True)), None)
    if first and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in first[1].body): yield f'cell {first[0]}: the first exported cell is not imports only'

def parses(rel, cells):
    for i, c in code(cells):
        if source(c).lstrip().startswith('%%'): continue
        try: parse(source(c))
        except SyntaxError as e: yield f'cell {i}: does not parse: {e}'

def short_cells(rel, cells):
    for i, c in code(cells):
        n = len([l for l in source(c).splitlines() if l.strip() and not l.lstrip().startswith('#|')])
        if exported(c) and n > MAX_LINES: yield f'cell {i}: exported cell of {n} lines (limit {MAX_LINES})'

def no_mixed_imports(rel, cells):
    for i, c, t in trees(cells, True):
        if {isinstance(n, (ast.Import, ast.ImportFrom)) for n in t.body} == {True, False}: yield f'cell {i}: mixes imports and code'

def imports_stand_alone(rel, cells):
    "Also outside exported cells: nbdev_proc_nbs runs a cell that imports without the cells before it, so nothing else may stand in it"
    for i, c, t in trees(cells):
        if exported(c): continue
        kinds = {type(n) for n in ast.walk(t)}
        if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}: yield f'cell {i}: imports and other code in one cell'

def documented(rel, cells):
    "A docstring on what is public, a comment on every parameter and on what is returned"
    for i, c, t in trees(cells, True):
        lines = source(c).splitlines()
        for n in t.body:
            if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith('_'): continue
            if not ast.get_docstring(n): yield f'cell {i}: {n.name} has no docstring'
            if isinstance(n, ast.ClassDef): continue
            args = [*n.args.posonlyargs, *n.args.args, *filter(None, [n.args.vararg]), *n.args.kwonlyargs]
            for a in args:
                if a.arg not in ('self', 'cls') and '#' not in lines[a.end_lineno-1]: yield f'cell {i}: {n.name}({a.arg}) has no comment'
            used = [a.end_lineno for a in args if a.arg not in ('self', 'cls')]
            gives = any(isinstance(r, ast.Return) and r.value is not None and not (isinstance(r.value, ast.Constant) and r.value.value is None) for r in ast.walk(n))
            end = n.body[0].lineno - 1
            if gives and used and not any('#' in l and re.match(r'\s*\)', l) for l in lines[n.lineno-1:end]) and '#' not in lines[n.lineno-1]:
                yield f'cell {i}: {n.name} does not say what it returns'

def nothing_swallowed(rel, cells):
    for i, c, t in trees(cells):
        for n in ast.walk(t):
            if isinstance(n, ast.ExceptHandler) and all(isinstance(b, ast.Pass) for b in n.body): yield f'cell {i}: an exception is swallowed'
            if isinstance(n, ast.ExceptHandler) and n.type is None and not any(isinstance(b, ast.Raise) for b in ast.walk(n)): yield f'cell {i}: a bare except'

def no_stub(rel, cells):
    for i, c, t in trees(cells, True):
        if any(isinstance(n, ast.Raise) and 'NotImplementedError' in ast.dump(n) for n in ast.walk(t)): yield f'cell {i}: raises NotImplementedError'

def no_global_filter(rel, cells):
    "A warnings filter only inside `with warnings.catch_warnings()`"
    for i, c, t in trees(cells):
        inside = {id(m) for n in ast.walk(t) if isinstance(n, ast.With) and 'catch_warnings' in ast.dump(n.items[0]) for m in ast.walk(n)}
        for n in ast.walk(t):
            name = n.func.attr if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) else n.func.id if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) else ''
            if name in ('filterwarnings', 'simplefilter') and id(n) not in inside: yield f'cell {i}: a global warnings filter'

def nothing_hidden(rel, cells):
    for i, c in code(cells):
        if directives(c).get('eval', '').strip().lower() == 'false': yield f'cell {i}: #| eval: false'
        if re.search(r'^\s*%%?time', source(c), re.M): yield f'cell {i}: a timing'
        if directives(c).get('echo', '').strip().lower() == 'false' and not c.get('outputs'):
            yield f'cell {i}: its code is not shown, and it has no output'

def clean_outputs(rel, cells):
    for i, o, text in outputs(cells):
        if o['output_type'] == 'error': yield f'cell {i}: an error is stored'
        if o.get('name') == 'stderr': yield f'cell {i}: stderr is stored'
        if o.get('execution_count') is not None: yield f'cell {i}: an execution count is stored'
        if m := MACHINE_PATH.search(o.get('name') and text or re.sub(r'<[^>]*>', ' ', text)): yield f'cell {i}: shows a path of a machine, {m[0][:40]}'
        if re.search(r'\bat 0x[0-9a-f]{6,}', text): yield f'cell {i}: shows the address of an object'
        if any('widget' in k for k in o.get('data', {})): yield f'cell {i}: shows a widget, which is empty without a kernel'
        if re.search(r'\d(?:it/s|s/it)\b|\d+%\|', text) or '\r' in text.replace('\r\n', ''): yield f'cell {i}: shows a progress bar'

def small_outputs(rel, cells):
    size, limit = 0, MAX_TUTORIAL if rel.startswith(('tutorials', 'course')) else MAX_OUTPUTS
    for i, o, _ in outputs(cells):
        size += len(json.dumps(o))
        n = len(text_of(o.get('data', {}).get('image/png', '')).strip())*3//4
        if n > MAX_FIGURE: yield f'cell {i}: a figure of {n:,} bytes (limit {MAX_FIGURE:,})'
    if size > limit: yield f'outputs are {size:,} bytes (limit {limit:,})'

def tells_and_shows(rel, cells):
    "Prose, assertions, a stored output and a figure in proportion to what is exported"
    n = sum(isinstance(d, (ast.FunctionDef, ast.ClassDef)) for _, _, t in trees(cells, True) for d in t.body)
    if not module_of(cells) or not n: return
    tests = sum(len(re.findall(r'\bassert\b|\btest_\w+\(', source(c))) for _, c in code(cells) if not exported(c))
    words = len(re.findall(r'\w+', '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')))
    kinds = [k for _, o, _ in outputs(cells) for k in o.get('data', {})]
    if tests < n: yield f'{n} exported definitions, {tests} assertions'
    if words < 40 + 12*n: yield f'{words} words of prose for {n} exported definitions'
    if not list(outputs(cells)): yield 'no stored output: run it and keep what it shows'
    if rel.split('/')[0] in FIGURE_ROOMS and 'image/png' not in kinds: yield 'no figure'

def stored_well(rel, cells):
    ids = [c.get('id') for c in cells]
    if any(not re.fullmatch(r'[0-9a-f]{8}', str(i)) for i in ids): yield 'a cell id is not 8 hex digits'
    if len(set(ids)) < len(ids): yield 'two cells have one id'
    if any(not isinstance(c['source'], list) for c in cells): yield 'a source is not a list of lines'
    if any(c['metadata'] for c in cells): yield 'a cell has metadata'

RULES = [name_is_numbered, module_is_the_name, begins, title, first_export_is_imports, parses, short_cells, no_mixed_imports, imports_stand_alone, documented,
         nothing_swallowed, no_stub, no_global_filter, nothing_hidden, clean_outputs, small_outputs, tells_and_shows, stored_well]

def complaints(rel, cells): return [f'{r.__name__}: {c}' for r in RULES for c in r(rel, cells)]
