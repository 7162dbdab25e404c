"""Is a lesion drawn as asked, where asked? On in-silico patients: `make bench NAME=lesion_ldm SEED=0`.

LesionLDM is trained on the patches of training patients (see `_lesions.py`) and fills the holes of test patients, of
whom nothing was learnt. Each hole is asked for the mass (or no mass) and the BI-RADS category of *another* test patch,
so what lies around the hole tells nothing of what is asked. View, density, laterality and box stay.

`attribute_agreement` is how often a verifier, trained on real patches, reads what was asked: mass or none, and for
masses BI-RADS 1-3 or 4-5; the mean over both. The verifier is refused unless it beats chance on test patients.

- `shuffled`: the same drawings, compared with the attributes that the place really had. What a drawing owes to its
  surroundings and to the size of its hole is in both.
- `copy_paste`: a real training patch with the asked attributes, nearest in the size of the box, scaled, set to the
  grey level around the hole and blended at its border.
- `real`: true patches and their own attributes.

`found_at_box`: a MommiNet-v2 detector of single views looks at the whole image with the drawing in it, where a mass
was asked for. It has found it if its best box in the hole overlaps with the asked one by more than 0.2 (IoU) and
scores more than boxes do of which there is half a false positive per validation image. `chance` looks for a box of
the same size at a place drawn anywhere in the breast, in the same detections. This is easy to beat: any filled hole
may look like a mass. `asked_healthy` is the harder floor: the share of the holes with such a box where no mass was
asked for.

`fid` and `kid` compare holes (48 x 48 pixels after scaling) of the first half of the test patients with true holes of
the second half, by a named network. `diversity` is 1 - SSIM between four drawings of one hole. `memorisation` is how
far drawn masses are from the nearest training mass, by how far real test masses are: below 1 they are copies.

Networks are small, and patches 64 pixels wide; the published ones are 224. Intervals are from a bootstrap over
patients, of one training. The recipe was changed once after a run on the test patients: a small U-Net that predicts
noise, trained for 20 epochs, followed nothing (`ldm - shuffled` of the agreement -.102 [-.131, -.075]). A transformer
that predicts velocity was then found on validation patients.
"""
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from torchvision.ops import box_iou, roi_align
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import options, tag
from benchmarks._lesions import (
    HEADS, SAMPLING, agreement, as_table, ask_other, copy_paste, draw, draw_once, gather, hole_boxes, part_of, samples,
    start, trained
)
from mammo_nb.learners.lesion_autoencoder import evaluate_reconstruction
from mammo_nb.learners.lesion_loop import find_drawn, find_lesions, other_boxes, paste_drawn
from mammo_nb.learners.lesion_verifier import check_verifier, measure_verifier
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.image_quality import set_distance
from mammo_nb.metrics.lesion_synthesis import (
    agreement_table, diversity, evaluate_agreement, memorisation, memorisation_table, region_crops
)
from mammo_nb.metrics.weighted import weighted_mean
from mammo_nb.models.feature_maps import ImageFeatures
from mammo_nb.models.lesion_verifier import verifier_targets

CROP = 48 # pixels of a hole, scaled, for FID
DIVERSE = 40 # holes that are filled four times
IMAGES = 300 # validation images on which the score of a detection is chosen

# Detection

def score_limit(detector, prepared, rows):
    "The score above which there is half a false positive per validation image"
    first = rows[rows.split == 'valid'].drop_duplicates('image_id')[:IMAGES]
    shown = samples(prepared, first)
    lesions = rows[rows.kinds != '']
    false = []
    for numbers in torch.arange(len(first)).split(16):
        found = find_lesions(detector, paste_drawn(shown, None, numbers.tolist()))
        for k, own in zip(numbers.tolist(), found):
            true = samples(prepared, lesions[lesions.image_id == shown.rows.image_id[k]])
            boxes = np.array([true.place_of(j)[0] for j in range(len(true))]).reshape(-1, 4)
            overlap = box_iou(torch.as_tensor(own['boxes'], dtype=torch.float64), torch.as_tensor(boxes)).numpy()
            false += own['scores'][overlap.max(1, initial=0) <= .2].tolist()
    return np.sort(false)[-max(1, len(first)//2)]

def found_table(detector, dataset, patches, limit, boxes=None):
    "A row for each asked mass: whether it is found"
    found = find_drawn(detector, dataset, patches, boxes, bs=16)
    seen = (found.found > 0) & (found.score > limit)
    return as_table(dataset.rows, np.where(found.found.isna(), np.nan, seen))

def healthy_table(detector, dataset, patches, limit):
    "A row for each place asked to be healthy: whether a mass is seen there"
    named = dataset.rows.assign(kinds=np.where(dataset.rows.kinds == '', 'mass', ''))
    return found_table(detector, samples(dataset.prepared, named), patches, limit)

def asked_more(asked, found, weight=None):
    "Share found where a mass was asked for, minus the share elsewhere"
    weight = np.ones(len(asked)) if weight is None else weight
    return weighted_mean(found, weight*asked)-weighted_mean(found, weight*(1-asked))

# Rows

def add_mean(bench, name, metric, table):
    bench.add_estimate(name, metric, bootstrap_ci(table, weighted_mean, columns=('value',)))

def add_difference(bench, name, metric, a, b):
    bench.add_estimate(name, metric, paired_difference([a], [b], weighted_mean, columns=('value',)))

def add_autoencoder(bench, autoencoder, dataset):
    "Reconstruction of whole test patches"
    for row in evaluate_reconstruction(autoencoder, dataset).itertuples():
        name = dict(psnr='psnr_db').get(row.metric, row.metric)
        bench.add('autoencoder', name, row.value, row.ci_low, row.ci_high, n=row.n)

def add_heads(bench, name, rows, inputs, predicted):
    "Accuracies of each head, and the accuracy of its majority class"
    targets = verifier_targets(inputs, 'suspicious')
    asked = {head: targets[head].numpy() for head in HEADS}
    table = agreement_table(rows, asked, {head: predicted[head].numpy() for head in HEADS})
    for row in evaluate_agreement(table).itertuples():
        head = f'{name}, {row.attribute}'
        bench.add(head, 'balanced_accuracy', row.balanced_accuracy, row.balanced_accuracy_low,
                  row.balanced_accuracy_high, n=row.n)
        bench.add(head, 'accuracy', row.accuracy, row.accuracy_low, row.accuracy_high, n=row.n)
        bench.add(head, 'majority', row.majority, n=row.n)

def add_agreement(bench, verifier, images, asked, own, rows):
    "Agreement of drawings, of the rival, of real patches, and of drawings with what was not asked"
    sources = dict(ldm=(images['ldm'], asked), copy_paste=(images['copy_paste'], asked), real=(images['real'], own),
                   shuffled=(images['ldm'], own))
    tables = {}
    for name, (shown, told) in sources.items():
        tables[name] = agreement(verifier, shown, told, rows)
        add_mean(bench, name, 'attribute_agreement', tables[name])
        add_heads(bench, name, rows, told, verifier.predict_attributes(shown))
    for other in ('shuffled', 'copy_paste'):
        add_difference(bench, f'ldm - {other}', 'attribute_agreement', tables['ldm'], tables[other])

def add_found(bench, detector, own, asked, images, limit, seed):
    "What a detector finds at the asked box"
    tables = dict(
        ldm=found_table(detector, asked, images['ldm'], limit),
        copy_paste=found_table(detector, asked, images['copy_paste'], limit),
        real=found_table(detector, own, None, limit),
        chance=found_table(detector, asked, images['ldm'], limit, other_boxes(asked, seed)),
        asked_healthy=healthy_table(detector, asked, images['ldm'], limit))
    for name, table in tables.items():
        add_mean(bench, name, 'found_at_box', table)
    for other in ('chance', 'copy_paste'):
        add_difference(bench, f'ldm - {other}', 'found_at_box', tables['ldm'], tables[other])
    both = pd.concat([tables['ldm'].assign(asked=1.), tables['asked_healthy'].assign(asked=0.)], ignore_index=True)
    more = bootstrap_ci(both, asked_more, columns=('asked', 'value'))
    bench.add_estimate('ldm - asked_healthy', 'found_at_box', more)

def hole_crops(images, mask):
    "[N,1,CROP,CROP] of the holes"
    boxes = hole_boxes(mask).float()
    index = torch.arange(len(boxes))[:, None].float()
    return roi_align(images, torch.cat([index, boxes], 1), CROP, aligned=True).clamp(0, 1)

def add_sets(bench, images, mask, patients):
    "FID and KID of the holes"
    network = ImageFeatures()
    first = torch.tensor(patients.isin(patients.unique()[:patients.nunique()//2]).to_numpy())
    crops = {name: hole_crops(own, mask) for name, own in images.items()}
    values = {}
    for name, own in crops.items():
        values[name] = set_distance(own[first], crops['real'][~first], network)
        for metric in ('fid', 'kid'):
            bench.add(f'{name}, {network.name}', metric, values[name][metric], n=values[name]['n_drawn'])
    difference = values['ldm']['fid']-values['copy_paste']['fid']
    bench.add(f'ldm - copy_paste, {network.name}', 'fid', difference, n=values['ldm']['n_drawn'])

def add_diversity(bench, model, asked, train, rows, seed):
    "How much four drawings of one hole differ"
    chosen = rows.drop_duplicates('patient_id')[:DIVERSE]
    asked = part_of(asked, torch.tensor(chosen.index))
    drawn = dict(
        ldm=[draw(model, asked, seed+k) for k in range(1, 5)],
        copy_paste=[copy_paste(asked, train, k) for k in range(4)])
    for name, images in drawn.items():
        several = torch.stack(images, 1)[:, :, 0].numpy()
        values = [diversity(own, mask[0].numpy()) for own, mask in zip(several, asked['mask'])]
        add_mean(bench, name, 'diversity', as_table(chosen, values))

def add_memorisation(bench, images, asked, own, train):
    "Distance of masses from the nearest training mass, drawn by real"
    def crops(inputs, patches):
        masses = verifier_targets(inputs, 'suspicious')['mass'] == 1
        return region_crops(patches[masses, 0].numpy(), inputs['box'][masses].numpy())
    table = memorisation_table(crops(asked, images['ldm']), crops(own, images['real']), crops(*train))
    found = memorisation(table)
    bench.add('nearest_training_patch', 'memorisation', found['ratio'], n=found['n_drawn'])
    bench.add('nearest_training_patch', 'share_near', found['share_near'], n=found['n_drawn'])

# The run

def measure(bench, prepared, rows, folder, networks, a, split='test'):
    "All rows"
    seed = a.seed
    model, verifier, detector = networks
    dataset = samples(prepared, rows[rows.split == split])
    add_autoencoder(bench, model.autoencoder, dataset)
    check_verifier(measure_verifier(verifier, dataset), heads=HEADS)

    wanted = samples(prepared, ask_other(dataset.rows, seed))
    own, true = gather(dataset)
    asked, _ = gather(wanted)
    train = gather(samples(prepared, rows[rows.split == 'train']))
    drawn = draw_once(folder/f'drawn_{a.train_seed}_{tag(split, seed, SAMPLING)}.pt', model, asked, seed)
    images = dict(ldm=drawn, copy_paste=copy_paste(asked, train), real=true)
    add_agreement(bench, verifier, images, asked, own, dataset.rows)
    limit = score_limit(detector, prepared, rows)
    add_found(bench, detector, dataset, wanted, images, limit, seed)
    add_sets(bench, images, own['mask'], dataset.rows.patient_id)
    add_diversity(bench, model, asked, train, dataset.rows, seed)
    add_memorisation(bench, images, asked, own, train)

def main(argv=None):
    a = options(__doc__, argv, patients=700, train_seed=0)
    bench = start('lesion_ldm', a, 'about an hour on 2 cores, most of it training')
    if bench.finished('nearest_training_patch', 'share_near'):
        return
    prepared, rows, folder, networks = trained(a)
    measure(bench, prepared, rows, folder, networks, a)

if __name__ == '__main__':
    main()
