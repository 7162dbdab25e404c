"""The relation block of MommiNet-v2: check 3 of its specification."""
import pytest
import torch
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.models.relation import GEOMETRIES, RelationBlock, relation_geometry, view_boxes, wave_code

SIZE = (200, 150)


def view(n, seed, **kwargs):
    "Random boxes in an image of 200 x 150 pixels of 1 mm"
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=rng)*100
    sides = 5+torch.rand(n, 2, generator=rng)*40
    boxes = torch.cat([corner, corner+sides], 1)
    return view_boxes(boxes, SIZE, **dict(nipple=(90+seed, 140-seed), spacing_mm=1.) | kwargs)


def enlarged(v, s, spacing=True):
    "The same view with s times as many pixels"
    spacing_mm = v.spacing_mm/s if spacing else v.spacing_mm
    return v._replace(boxes=v.boxes*s, nipple=v.nipple*s, covariance=v.covariance*s**2,
                      size=tuple(round(n*s) for n in v.size), spacing_mm=spacing_mm)


def run(block, main, other, seed=0):
    "Output of a block for random features"
    rng = torch.Generator().manual_seed(seed)
    dim = block.query.in_features
    features = [torch.randn(len(v.boxes), dim, generator=rng) for v in (main, other)]
    with torch.no_grad():
        return block(*features, *relation_geometry(main, other, block.geometry)), features


def block_of(geometry='nipple', dim=32, heads=4):
    "A block with random weights: a new one adds nothing"
    seed_everything(3)
    block = RelationBlock(dim, heads, geometry).eval()
    with torch.no_grad():
        for weights in block.parameters():
            weights.uniform_(-.17, .17)
    return block


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_the_order_of_the_other_boxes_changes_nothing(geometry):
    block = block_of(geometry)
    main, other = view(5, 1), view(7, 2)
    out, (f_main, f_other) = run(block, main, other)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = other._replace(boxes=other.boxes[order])
    with torch.no_grad():
        again = block(f_main, f_other[order], *relation_geometry(main, shuffled, geometry))
    assert torch.allclose(out, again, atol=1e-6)
    assert (out-f_main).abs().max() > 1e-3  # and it does something


@pytest.mark.parametrize('geometry', ['nipple', 'image_centre'])
def test_equal_distances_and_sizes_are_zero(geometry):
    main = view(4, 1)
    values, variances = relation_geometry(main, main, geometry)
    assert not values[range(4), range(4)].any()
    assert not variances.any()
    assert torch.equal(values, -values.transpose(0, 1))


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('n', [0, 3])
def test_without_other_boxes_nothing_is_added(geometry, n):
    block = block_of(geometry)
    out, (f_main, _) = run(block, view(n, 1), view(0, 2))
    assert torch.equal(out, f_main)
    empty, _ = run(block, view(0, 1), view(3, 2))
    assert empty.shape == (0, 32)


def test_an_equal_distance_weighs_more_than_a_triple_one():
    "With a positive weight of the geometry and without appearance"
    block = block_of()
    for layer in (block.query, block.key, block.geometry_weight):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        block.geometry_weight.weight[:, 1::2] = 1.  # the cosines
    at = lambda distances: view_boxes([[15, 20+d-5, 25, 20+d+5] for d in distances], SIZE, (20, 20), spacing_mm=1.)
    features = torch.randn(1, 32), torch.randn(2, 32)
    with torch.no_grad():
        weights = block.attention(*features, *relation_geometry(at([40]), at([40, 120])))
    assert (weights[..., 0] > weights[..., 1]).all()


@pytest.mark.parametrize('geometry', ['nipple', 'image_centre'])
@pytest.mark.parametrize('waves', [8, 12])
def test_a_new_block_adds_nothing_and_looks_at_equal_distances(geometry, waves):
    seed_everything(0)
    block = RelationBlock(32, 4, geometry, waves).eval()
    origin = (20, 20) if geometry == 'nipple' else (100, 75)  # the centre of the image
    row, col = origin
    at = lambda distances: view_boxes([[col-5, row+d-5, col+5, row+d+5] for d in distances], SIZE, (20, 20), spacing_mm=1.)
    distances = torch.tensor([10., 20., 30., 36., 40., 44., 54., 80., 90.])
    main, other = at([40]), at(distances.tolist())
    out, (f_main, f_other) = run(block, main, other)
    assert torch.equal(out, f_main)
    with torch.no_grad():
        weights = block.attention(f_main, f_other, *relation_geometry(main, other, geometry))[:, 0]
    assert (weights.argmax(1) == 4).all()
    far = (distances/40).log().abs() > .25
    assert (weights[:, far] < weights[:, 4:5]/2).all()


def test_a_new_block_without_waves_of_that_width_starts_too():
    assert RelationBlock(32, 4, waves=1).geometry_weight.weight.isfinite().all()


def test_offsets_of_boxes_start_without_a_preference():
    seed_everything(0)
    block = RelationBlock(32, 4, 'box_location')
    assert block.geometry_weight.weight.abs().max() < .1
    assert not block.value.weight.any()


@pytest.mark.parametrize('spacing', [None, 1.])
@pytest.mark.parametrize('geometry, both', [
    ('nipple', True), ('nipple', False), ('image_centre', True), ('image_centre', False), ('box_location', True)])
def test_the_scale_of_a_view_does_not_matter(geometry, spacing, both):
    "In millimetres, and in fractions of the image where the spacing is unknown"
    block = block_of(geometry)
    main, other = view(4, 1, spacing_mm=spacing), view(6, 2, spacing_mm=spacing)
    covariance = torch.tensor([[8., 1.], [1., 5.]])
    main, other = (v._replace(covariance=covariance) for v in (main, other))
    expected, _ = run(block, main, other)
    found, _ = run(block, enlarged(main, 4) if both else main, enlarged(other, 4))
    assert torch.allclose(expected, found, atol=1e-4)


def test_pixels_of_another_size_are_not_compared():
    "Other pixels with the same spacing are other millimetres"
    main, other = view(4, 1), view(6, 2)
    values, _ = relation_geometry(main, other)
    larger, _ = relation_geometry(main, enlarged(other, 4, spacing=False))
    assert torch.allclose(larger[..., 0], values[..., 0]-torch.tensor(4.).log(), atol=1e-4)


def test_tiny_boxes_and_boxes_on_the_nipple_stay_finite():
    nipple = (50, 50)
    degenerate = view_boxes([[50, 50, 50, 50], [49, 49, 51, 51]], SIZE, nipple, torch.eye(2)*4)
    for geometry in GEOMETRIES:
        values, variances = relation_geometry(degenerate, view(3, 1), geometry)
        assert values.isfinite().all() and variances.isfinite().all()


def test_an_unknown_nipple_is_the_limit_of_an_uncertain_one():
    block = block_of()
    main, other = view(4, 1), view(6, 2)
    unknown, _ = run(block, main._replace(nipple=torch.full((2,), torch.nan)), other)
    vague, _ = run(block, main._replace(covariance=torch.eye(2)*1e12), other)
    certain, _ = run(block, main, other)
    assert torch.allclose(unknown, vague, atol=1e-6)
    assert not torch.allclose(unknown, certain, atol=1e-4)
    assert unknown.isfinite().all()


def test_the_nipple_matters_only_where_it_should():
    main, other = view(4, 1), view(6, 2)
    moved = other._replace(nipple=other.nipple-40)
    for geometry, changes in dict(nipple=True, image_centre=False, box_location=False).items():
        before, after = (relation_geometry(main, v, geometry)[0] for v in (other, moved))
        assert torch.equal(before, after) != changes


def test_waves_are_those_of_the_published_code():
    "16 numbers for each ratio, sines and cosines in turn"
    code = wave_code(torch.tensor([[.3, -.2, 0.]]))
    assert code.shape == (1, 48)
    frequencies = 100/1000**(torch.arange(8)/8)
    assert torch.allclose(code[0, 0:16:2], (.3*frequencies).sin(), atol=1e-5)
    assert torch.allclose(code[0, 17:32:2], (-.2*frequencies).cos(), atol=1e-5)


@pytest.mark.parametrize('arguments, what', [
    (dict(heads=5), 'heads'), (dict(geometry='pectoral'), 'geometry'), (dict(heads=0), 'heads')])
def test_wrong_arguments_are_named(arguments, what):
    with pytest.raises(InputError) as found:
        RelationBlock(32, **arguments)
    assert found.value.what == what


def test_gradients_reach_every_weight():
    block = block_of()
    main, other = view(5, 1), view(7, 2)
    features = torch.randn(5, 32), torch.randn(7, 32)
    block(*features, *relation_geometry(main, other)).square().sum().backward()
    missing = [name for name, p in block.named_parameters() if not p.grad.any()]
    assert missing in ([], ['key.bias'])  # a constant in a softmax changes nothing


def test_a_block_without_storage_is_made():
    with torch.device('meta'): block = RelationBlock(32, 4)
    here = RelationBlock(32, 4)
    assert {n: p.shape for n, p in block.named_parameters()} == {n: p.shape for n, p in here.named_parameters()}
    assert all(p.is_meta for p in block.parameters())
