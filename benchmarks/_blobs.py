"""Blobs: the detector that costs nothing. Differences of Gaussians at several scales, and a logistic regression.

A blob is a local maximum, over place and scale, of the difference of two Gaussian filters. Of blobs that
overlap the larger answer is kept. Each is described by the answers of all scales at its place, and a
logistic regression on the training images tells masses from the rest.
"""
import numpy as np
import torch
from scipy import ndimage
from skimage.feature import blob_dog
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.ops import box_iou

SIGMAS = dict(min_sigma=1.5, max_sigma=9., sigma_ratio=1.4) # prepared pixels
THRESHOLD, OVERLAP = .004, .3 # of the answers; of two blobs, above which the smaller answer is dropped
SCALES = [1.5*1.4**k for k in range(7)]
HIT = .2 # overlap with a mass that makes a blob a mass

def find_blobs(image, mask):
    "Boxes [n,4] (xyxy, prepared pixels) of the blobs of an image [H,W], and their answers [n,F]"
    inside = ndimage.gaussian_filter(mask.astype(np.float32), 6.)
    local = ndimage.gaussian_filter(image*mask, 6.)/np.maximum(inside, 1e-3)
    x = np.where(mask, image-local, 0.) # without the slow change of thickness
    found = blob_dog(x, threshold=THRESHOLD, overlap=OVERLAP, **SIGMAS)
    found = found[mask[tuple(found[:, :2].astype(int).T)]]
    blurred = [ndimage.gaussian_filter(x, s) for s in (*SCALES, 1.4*SCALES[-1])]
    answers = np.stack([a-b for a, b in zip(blurred, blurred[1:])], -1)
    row, col, sigma = found.T
    half = np.sqrt(2)*sigma
    boxes = np.stack([col+.5-half, row+.5-half, col+.5+half, row+.5+half], 1)
    at = answers[row.astype(int), col.astype(int)]
    level = local[row.astype(int), col.astype(int)]
    return boxes, np.column_stack([at, at.max(1), sigma, level])

def fit_blobs(images, masks, findings):
    "Fit the regression; `findings`: true boxes [k,4] of each image, prepared pixels"
    features, labels = [], []
    for image, mask, true in zip(images, masks, findings, strict=True):
        boxes, answers = find_blobs(image, mask)
        overlaps = box_iou(torch.tensor(boxes), torch.tensor(true).double()).numpy()
        features.append(answers)
        labels.append(overlaps.max(1, initial=0) > HIT)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(np.concatenate(features), np.concatenate(labels))

def detect_blobs(model, image, mask):
    "Boxes [n,4] and their probabilities"
    boxes, answers = find_blobs(image, mask)
    scores = model.predict_proba(answers)[:, 1] if len(boxes) else np.zeros(0)
    return boxes, scores
