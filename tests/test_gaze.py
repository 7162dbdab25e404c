"""Gaze: files as recorders write them, names that could be two images, filters and maps at their limits."""
import numpy as np
import pandas as pd
import pytest
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import rng_for
from mammo_nb.gaze.check import check_gaze, dwell_shares, read_cohort_gaze
from mammo_nb.gaze.fixations import find_fixations
from mammo_nb.gaze.heatmap import gaze_to_heatmap, perturb_gaze
from mammo_nb.gaze.miceye import NotInLog, miceye_samples, read_miceye
from mammo_nb.gaze.readings import match_readings, read_gaze, write_fixations
from mammo_nb.gaze.tobii import read_tobii
from mammo_nb.gaze.viewport import Viewport, pixels_per_degree, screen_to_image
from mammo_nb.insilico.gaze_simulator import record, simulate_fixations, write_miceye
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.preparation.prepared_cohort import prepare_cohort

METHODS = ('dispersion', 'velocity')
STILL = pd.DataFrame(dict(time_ms=np.arange(60)*10., row=50., col=np.repeat([20., 80.], 30))) # 300 ms here, 300 ms there
SHAPE = (200, 160)

@pytest.fixture
def file(tmp_path):
    return tmp_path/'gaze.csv'

def write(path, *lines):
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path

def heatmap(places, durations=None, shape=SHAPE, **kwargs):
    "The map of one slice"
    return gaze_to_heatmap(places, durations, shape, **kwargs)[0][0]

# ---- MicEye

BAD_LINES = {
    'a.dcm;1;[[3, 4]]': 'found 3 fields',
    'a.dcm;1;[[3, 4;[];(1,1)': 'numbers in brackets',
    'a.dcm;1;[[3, 4, 5]];[];(1, 1)': 'line 1',
    'a.dcm;1;None;[];(1, 1)': 'line 1',
    'a.dcm;1;[[[3, 4], 0]];[];(1, 1)': 'line 1'}

@pytest.mark.parametrize('line', BAD_LINES)
def test_damaged_lines_of_a_log(file, line):
    with pytest.raises(InputError, match=BAD_LINES[line]):
        read_miceye(write(file, line))

def test_a_log_that_is_missing_or_not_text(file):
    with pytest.raises(InputError, match='a readable MicEye log'):
        read_miceye(file)
    file.write_bytes('D:\\Röntgen\\cc.png;1;[[5, 6]];[];(-1, -1)\n'.encode('cp1252'))
    with pytest.raises(InputError, match='UnicodeDecodeError'):
        read_miceye(file)

def test_the_recorder_that_zooms(file):
    "Its points are stored pixels already, whatever the number of rows shown; an empty line is no reading"
    reading, = read_miceye(write(file, 'a.png;1;[[[50, 100], 0.5], [[200, 400], 2.0], [None, 2.0]];[];(-1, -1)', ''))
    samples = miceye_samples(reading, display_rows=900, shape=(1800, 1440))
    assert samples[['row', 'col']].to_numpy()[:2].tolist() == [[200, 100], [200, 100]]
    assert samples.row.isna().tolist() == [False, False, True]

def test_looks_pressed_to_each_border():
    points = np.array([[0, 50], [449, 300], [900, 300], [450, 720.], [100, 0]]) # above, middle, below, right, left
    samples = miceye_samples(dict(image='a', points=points), display_rows=900, shape=(1800, 1440))
    assert samples.row.isna().tolist() == [True, False, True, True, True]
    assert samples.iloc[1, 1:].tolist() == [899, 601]

def test_wrong_arguments_of_miceye_samples():
    reading = dict(image='a', points=np.array([[900., 700.]]))
    with pytest.raises(InputError, match='is display_rows right'):
        miceye_samples(reading, display_rows=800, shape=(1800, 1440))
    with pytest.raises(InputError, match='shape'):
        miceye_samples(reading, display_rows=900)
    with pytest.raises(InputError, match='sampling_rate_hz'):
        miceye_samples(reading, 0)

def test_points_keep_the_rate_of_the_tracker():
    samples = miceye_samples(dict(points=np.ones((3, 2))))
    assert np.diff(samples.time_ms).round(2).tolist() == [16.67, 16.67]

# ---- names of images

def test_identifiers_with_dots_are_names(file):
    write(file, '1.3.6.1.100;1;[[5, 6]];[];(-1, -1)')
    assert read_gaze(file, image=('case_7', '1.3.6.1.100')).row.tolist() == [6]
    with pytest.raises(NotInLog, match='one of the images'):
        read_gaze(file, image='1.3.6.1.101') # one image, but another

def test_two_folders_with_one_name(file):
    write(file, 'D:\\p1\\cc.png;1;[[5, 6]];[];(-1, -1)', 'D:\\p2\\cc.png;1;[[7, 8]];[];(-1, -1)')
    assert read_gaze(file, image='p2/cc.dcm').col.tolist() == [7]
    for name, message in (('cc.dcm', 'a name that tells'), ('p3/cc.dcm', 'or no gaze_path')):
        with pytest.raises(InputError, match=message):
            read_gaze(file, image=name)

def test_a_session_needs_the_name_of_the_image(file):
    write(file, 'p1_cc.png;1;[[100, 450]];[];(-1, -1)', 'p1_mlo.png;1;[[7, 8]];[];(-1, -1)')
    with pytest.raises(InputError, match='one of the images of the log: p1_cc, p1_mlo'):
        read_gaze(file, image='p2_cc')
    with pytest.raises(InputError, match='one of the 2 images'):
        read_gaze(file)

def test_matching_readings(file):
    write(file, 'D:\\A\\cc.png;1;[[5, 6]];[];(-1, -1)', 'D:\\A\\mlo.png;1;[[7, 8]];[];(-1, -1)')
    images = dict(a=('a', 'A/cc.dcm'), b=('b', 'B/cc.dcm'), c=('c', 'A/mlo.dcm'), d=('d', 'A/other.dcm'))
    assert match_readings(file, images) == dict(a='D:\\A\\cc.png', b='D:\\A\\cc.png', c='D:\\A\\mlo.png')

def test_matching_a_table(file):
    fixations = pd.DataFrame(dict(row=[1.], col=[2.], duration_ms=[3.]))
    write_fixations(file, fixations)
    assert match_readings(file, dict(a='a', b='b')) == dict(a='', b='')
    write_fixations(file, fixations[:0]) # without gaze it may belong to any image
    assert match_readings(file, dict(a='a', b='b')) == {}

def test_matching_a_log_that_is_not_text_further_down(file):
    file.write_bytes(b'D:\\A\\cc.png;1;[[5, 6]];[];(-1, -1)\n'*400 + 'D:\\Röntgen\\cc.png;1;[[5, 6]];[];(-1, -1)\n'.encode('cp1252'))
    with pytest.raises(InputError, match='gaze log: found UnicodeDecodeError'):
        match_readings(file, dict(a='A/cc.dcm'))

# ---- tables

@pytest.mark.parametrize('lines, message', [
    (['x,y', '1,2'], 'found x, y'),
    (['row,col,duration_ms', '1,2,-5'], 'durations of 0 or more'),
    (['row,col,duration_ms', '1,here,5'], 'found texts'),
    (['Recording timestamp [ms];Gaze point X [DACS px];Gaze point Y [DACS px];Sensor;Event', '0;1;2;Eye Tracker;'], 'read_tobii')])
def test_tables_that_are_no_fixations(file, lines, message):
    with pytest.raises(InputError, match=message):
        read_gaze(write(file, *lines))

def test_a_blank_line_before_a_log_changes_nothing(file, tmp_path):
    log = tmp_path/'log.txt'
    write_miceye(log, 'a.dcm', 1, np.array([[3., 4.], [5., 6.]]))
    write(file, '', log.read_text())
    assert read_gaze(file).equals(read_gaze(log))
    assert np.isclose(read_gaze(log).duration_ms.sum(), 2*1000/60)

def test_two_readers_stay_two(file, tmp_path):
    write(file, 'a.png;1;[[5, 6], [7, 8]];[];(-1, -1)', 'b.png;1;[[1, 1]];[];(-1, -1)', 'a.png;1;[[9, 9]];[];(-1, -1)')
    twice = read_gaze(file, image='a.png')
    assert twice.reading.tolist() == [0, 0, 1]
    write_fixations(tmp_path/'table.csv', twice)
    assert read_gaze(tmp_path/'table.csv').equals(twice)

# ---- Tobii

STUDIO = ['RecordingName\tSensor\tRecordingTimestamp\tEvent\tGazePointX (MCSpx)\tGazePointX (ADCSpx)\tGazePointY (MCSpx)\tGazePointY (ADCSpx)',
          'a\t\t0\tImageStart\t\t\t\t', 'a\tEye Tracker\t0\t\t1\t400,5\t2\t300,25', 'a\tMouse\t5\t\t9\t9\t9\t9',
          'a\tEye Tracker\t17\t\t1\t401\t2\t300', 'b\tEye Tracker\t3\t\t1\t7\t2\t8']

def test_an_export_of_studio(file):
    "Decimal commas, another unit of the same places, a mouse, an event at the time of a sample, two recordings"
    write(file, *STUDIO)
    assert read_tobii(file, recording='a').to_numpy().tolist() == [[0, 400.5, 300.25], [17, 401, 300]]
    with pytest.raises(InputError, match='found None, expected one of a, b'):
        read_tobii(file)

def test_a_row_with_an_eye_wins_over_an_event_of_the_same_moment(file):
    write(file, 'Recording timestamp [μs]\tEvent\tGaze point X [DACS px]\tGaze point Y [DACS px]', '0\tKey\t\t', '0\t\t5\t6', '8000\t\t5\t6')
    assert read_tobii(file).to_numpy().tolist() == [[0, 5, 6], [8, 5, 6]]

def test_commas_and_lost_samples(file):
    write(file, 'Recording timestamp,Gaze point X,Gaze point Y,ignored', '0,5,6,1', '8,,,1')
    assert read_tobii(file).x.isna().tolist() == [False, True]

def test_an_unknown_stimulus_is_answered_with_the_known_ones(file):
    write(file, 'Recording timestamp [ms]\tPresented Stimulus name\tGaze point X [DACS px]\tGaze point Y [DACS px]',
          '0\tL-CC\t5\t6', '8\tR-CC\t5\t6')
    with pytest.raises(InputError, match='one of L-CC, R-CC'):
        read_tobii(file, stimulus='L-MLO')

@pytest.mark.parametrize('lines, message', [
    (['Recording timestamp [μs]\tEvent\tGaze point X [DACS mm]\tGaze point Y [DACS mm]', '0\t\t5\t6'], 'pixels of the screen'),
    ([], 'a readable table'), (['a,b', '1,2'], 'Recording timestamp')], ids=['mm', 'empty', 'no clock'])
def test_tables_that_are_no_recording(file, lines, message):
    with pytest.raises(InputError, match=message):
        read_tobii(write(file, *lines) if lines else file)

# ---- from the screen to the image

@pytest.mark.parametrize('screen, message', [((0, 0, 0, 9), 'enclose an area'), ((9, 0, 0, 9), 'turn `image` round')])
def test_wrong_viewports(screen, message):
    with pytest.raises(InputError, match=message):
        Viewport(screen, (0, 0, 9, 9))

def test_a_viewport_that_ends():
    samples = pd.DataFrame(dict(time_ms=[0, 20], x=[5., 5], y=[5., 5]))
    shown = screen_to_image(samples, Viewport((0, 0, 9, 9), (0, 0, 9, 9), 0, 10))
    assert shown.row.isna().tolist() == [False, True]

def test_no_viewport():
    with pytest.raises(InputError, match='at least one Viewport'):
        screen_to_image(pd.DataFrame(dict(time_ms=[0.], x=[1.], y=[1.])), [])

def test_pixels_per_degree_needs_a_distance():
    with pytest.raises(InputError, match='distance_mm'):
        pixels_per_degree(0, .2)

# ---- fixations

@pytest.mark.parametrize('method', METHODS)
def test_two_places(method):
    found = find_fixations(STILL, 20, method)
    assert found.to_numpy().tolist() == [[50, 20, 300, 0], [50, 80, 300, 300]]

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('lost, durations', [((10, 14), [250, 300]), ((8, 18), [110, 300])])
def test_blinks(method, lost, durations):
    "50 ms lost: neither added nor a cut; 110 ms lost: what is left is 80 and 110 ms"
    samples = STILL.copy()
    samples.loc[lost[0]:lost[1], ['row', 'col']] = np.nan
    assert find_fixations(samples, 20, method).duration_ms.tolist() == durations

@pytest.mark.parametrize('method', METHODS)
def test_a_new_viewport_ends_a_fixation(method):
    zoomed = STILL.assign(window=[0]*15 + [1]*45)
    assert find_fixations(zoomed, 20, method).duration_ms.tolist() == [150, 150, 300]

def test_degrees_that_change_with_the_zoom():
    wander = STILL.assign(col=50 + 20*np.sin(np.arange(60)/3))
    zooming = find_fixations(wander, np.append(np.full(30, 20.), np.full(30, 40.)))
    assert zooming.start_ms.iloc[-1] >= 250
    with pytest.raises(InputError, match='pixels_per_degree'):
        find_fixations(STILL, np.where(np.arange(60) == 7, 0, 20))

@pytest.mark.parametrize('rate', [60, 120, 300, 600])
def test_times_in_whole_milliseconds(rate):
    samples = pd.DataFrame(dict(time_ms=np.round(np.arange(rate)*1000/rate), row=5., col=5.))
    assert np.isclose(find_fixations(samples, 20).duration_ms[0], 1000, atol=5)

def test_nothing_to_find():
    assert len(find_fixations(STILL.assign(row=np.nan), 20)) == 0
    assert len(find_fixations(STILL[:0], 20, 'velocity')) == 0
    assert (find_fixations(STILL[:0], 20).dtypes == float).all()
    empty = STILL[:0].assign(reading=[])
    assert list(find_fixations(empty, 20)) == ['row', 'col', 'duration_ms', 'start_ms', 'reading']

@pytest.mark.parametrize('method', METHODS)
def test_the_clock_of_each_reading_begins_anew(method):
    two = pd.concat([STILL.assign(reading=0), STILL.assign(reading=1)])
    found = find_fixations(two, 20, method)[['duration_ms', 'start_ms', 'reading']]
    assert found.to_numpy().tolist() == [[300, 0, 0], [300, 300, 0], [300, 0, 1], [300, 300, 1]]

def test_a_reading_without_fixations():
    darting = pd.concat([STILL.assign(reading=0), STILL.assign(reading=1, col=np.arange(60)*50.)])
    found = find_fixations(darting, 20)
    assert found.reading.tolist() == [0, 0]
    assert (found.dtypes.drop('reading') == float).all()

def test_one_look_of_two_readers_is_two():
    same = pd.concat([STILL[30:].assign(reading=k) for k in (0, 1)]).assign(time_ms=np.arange(60)*10.)
    assert find_fixations(same, np.full(60, 20.)).reading.tolist() == [0, 1]
    assert len(find_fixations(same.drop(columns='reading'), 20)) == 1

def test_wrong_arguments_of_find_fixations():
    with pytest.raises(InputError, match='method'):
        find_fixations(STILL, 20, 'blobs')
    with pytest.raises(InputError, match='step backwards'):
        find_fixations(STILL[::-1], 20)

# ---- heat maps

def test_dwell_time_counts_and_nothing_else_changes():
    def peaks(durations):
        return heatmap([(30, 20), (70, 50)], durations, (96, 72), sigma_px=5, normalize=None)[[30, 70], [20, 50]]
    assert np.allclose(peaks([200, 100])/peaks([100, 100]), [2, 1], atol=1e-4)
    stream = [(30, 20)]*12 + [(70, 50)]*6
    a = heatmap(stream, None, (96, 72), sigma_px=5)
    b = heatmap(stream + [(-5, 4), (np.nan, np.nan), (40, 500)], None, (96, 72), sigma_px=5)
    assert (a == b).all()
    assert np.isclose(a[70, 50]/a[30, 20], .5, atol=.01)

def test_a_map_is_symmetric_about_the_place():
    one = heatmap([(100.5, 60.5)], sigma_px=9)
    assert np.unravel_index(one.argmax(), SHAPE) == (100, 60)
    assert np.allclose(one, np.roll(one[::-1], 2*100-199, 0), atol=1e-6)

@pytest.mark.parametrize('n, place, axis', [(200, 100.5, 1), (160, 60.5, 0)])
def test_the_width_of_the_blur_in_both_directions(n, place, axis):
    total = heatmap([(100.5, 60.5)], sigma_px=9, normalize='sum')
    assert np.isclose(((np.arange(n)+.5-place)**2*total.sum(axis)).sum(), 81, atol=.5)

def test_cells_that_do_not_divide_the_image():
    "13.5 cells of 8 pixels: 14 equal ones"
    part = heatmap([(54, 88)], None, (108, 108), sigma_px=4, stride=8, normalize='sum')
    centres = (np.arange(14)+.5)*108/14
    assert np.allclose([(centres*part.sum(axis)).sum() for axis in (1, 0)], [54, 88], atol=.1)
    assert heatmap([(50, 40)], sigma_px=6, stride=8).shape == (25, 20)

def test_nothing_is_lost_at_the_edge():
    edge = heatmap([(.2, .2), (31.9, 31.9)], None, (32, 32), sigma_px=0, normalize=None)
    assert np.isclose(edge.sum(), 2, atol=1e-6)

def test_slices_follow_the_order():
    first, last = gaze_to_heatmap([(50, 40), (150, 120)], [1, 1], SHAPE, sigma_px=6, n_slices=2)[0]
    assert first[50, 40] > .9
    assert last[150, 120] > .9
    assert first[150, 120] < 1e-6

def test_each_reading_is_cut_by_itself():
    "A second, slower reader of the same order: the same parts"
    places = [(50, 40), (150, 120)]
    once = gaze_to_heatmap(places, [1, 1], SHAPE, sigma_px=6, n_slices=2)[0]
    twice = gaze_to_heatmap(places*2, [1, 1, 3, 3], SHAPE, sigma_px=6, n_slices=2, readings=[0, 0, 1, 1])[0]
    assert np.allclose(twice, once, atol=1e-6)

def test_no_gaze():
    assert gaze_to_heatmap([], None, (8, 8), sigma_px=2)[1] is False

@pytest.mark.parametrize('kwargs, message', [
    (dict(sigma_px=1, sigma_mm=1), 'one of sigma_px'), (dict(), 'found nothing'), (dict(sigma_mm=1), 'pixel_spacing_mm'),
    (dict(sigma_deg=1), 'pixels_per_degree'), (dict(sigma_px=6, readings=[0, 1]), 'one a place'),
    (dict(sigma_px=6, durations=[-1]), '0 or more'), (dict(sigma_px=6, shape=None), 'shape')], ids=str)
def test_wrong_arguments_of_a_heat_map(kwargs, message):
    with pytest.raises(InputError, match=message):
        gaze_to_heatmap(**dict(points=[(50, 40)], shape=SHAPE) | kwargs)

# ---- worse gaze

@pytest.fixture(scope='module')
def gaze():
    y, x = np.mgrid[:384, :288]
    breast = ((x/150)**2 + ((y-192)/130)**2 < 1).astype(float)
    points = record(rng_for(2), simulate_fixations(rng_for(0), breast, [(150, 80, 1.)]))
    return pd.DataFrame(dict(row=points[:, 0], col=points[:, 1], duration_ms=1000/60))

def test_perturbed_gaze_keeps_its_form(gaze):
    worse = perturb_gaze(gaze, np.random.default_rng(0), noise=5, keep=.5)
    assert list(worse) == list(gaze)
    assert .3 < len(worse)/len(gaze) < .7

def test_an_offset_moves_all_places_together(gaze):
    moved = perturb_gaze(gaze, np.random.default_rng(1), offset=7)[['row', 'col']] - gaze[['row', 'col']]
    assert np.allclose(np.hypot(moved.row, moved.col), 7)
    assert moved.row.std() < 1e-9

def test_noise_moves_each_place_by_itself(gaze):
    moved = perturb_gaze(gaze, np.random.default_rng(2), noise=5)[['row', 'col']] - gaze[['row', 'col']]
    assert np.allclose(moved.std(), 5, rtol=.25)

def test_a_fraction_above_one(gaze):
    with pytest.raises(InputError, match='keep'):
        perturb_gaze(gaze, np.random.default_rng(0), keep=2)

# ---- gaze that does not fit its images

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "Four images with gaze"
    folder = tmp_path_factory.mktemp('gaze')
    patients = insilico_cohort(1, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25)
    cohort = write_insilico(patients, folder/'files', workers=1, progress=False)
    return prepare_cohort(cohort, folder/'cache', size=(96, 72), workers=1, progress=False)

def with_gaze(prepared, change):
    "The same prepared cohort with changed gaze"
    cohort = prepared.cohort
    images = cohort.images.copy()
    for i, row in images.iterrows():
        name = f'{change.__name__}_{row.image_id}.csv'
        write_fixations(cohort.root/name, change(read_gaze(cohort.file(row.gaze_path))))
        images.loc[i, 'gaze_path'] = name
    return prepare_cohort(Cohort(images, cohort.findings, cohort.root), prepared.cache, prepared.config, workers=1, progress=False)

def exchange(gaze):
    return gaze.rename(columns=dict(row='col', col='row'))

def enlarge(gaze):
    return gaze.assign(row=5*gaze.row, col=5*gaze.col)

def reduce(gaze):
    return gaze.assign(row=.4*gaze.row, col=.4*gaze.col)

def lose_some(gaze):
    "Every seventh place off the image"
    return gaze.assign(row=np.where(np.arange(len(gaze)) % 7 == 0, -20, gaze.row))

def test_gaze_that_fits_is_accepted(prepared):
    assert check_gaze(prepared, show=False).on_breast['as given'] > .95

@pytest.mark.parametrize('change, message', [
    (exchange, 'with rows and columns exchanged it would be'), (enlarge, 'with all places multiplied by about 0.[12]'),
    (reduce, 'with all places multiplied by about [123]'), (lose_some, 'off the images, expected at most 10%')])
def test_exchanged_or_scaled_gaze_is_refused(prepared, change, message):
    "It was accepted, and most of it vanished from the maps"
    with pytest.raises(InputError, match=message):
        check_gaze(with_gaze(prepared, change), show=False)

def test_lost_samples_do_not_count(prepared):
    def lose(gaze):
        return gaze.assign(row=np.where(np.arange(len(gaze)) % 2 == 0, np.nan, gaze.row))
    on_breast, off_image = dwell_shares(read_cohort_gaze(with_gaze(prepared, lose)))
    assert on_breast > .95
    assert off_image < .05

def test_a_cohort_without_gaze(prepared):
    cohort = prepared.cohort
    without = Cohort(cohort.images.drop(columns='gaze_path'), cohort.findings, cohort.root)
    with pytest.raises(InputError, match='gaze_path'):
        check_gaze(prepare_cohort(without, prepared.cache, prepared.config, workers=1, progress=False))

def other_images(prepared, ids):
    "The same prepared cohort, with logs of other images for some of the images"
    cohort = prepared.cohort
    images = cohort.images.copy()
    for i, row in images[images.image_id.isin(ids)].iterrows():
        name = f'others_{row.image_id}.txt'
        log = cohort.file(row.gaze_path).read_text(encoding='utf-8')
        write(cohort.root/name, log.replace(row.image_id, 'another image'))
        images.loc[i, 'gaze_path'] = name
    return prepare_cohort(Cohort(images, cohort.findings, cohort.root), prepared.cache, prepared.config, workers=1, progress=False)

@pytest.mark.parametrize('show', [True, False])
def test_logs_of_other_images_are_refused(prepared, show):
    "They passed with nothing on the breast, or ended in an error of the figure"
    with pytest.raises(InputError, match='no reading of any of the 4 images'):
        check_gaze(other_images(prepared, prepared.keys), show=show)

def test_images_that_are_not_in_their_logs_are_counted(prepared, capsys):
    some = other_images(prepared, list(prepared.keys)[:3])
    assert check_gaze(some, show=False).on_breast['as given'] > .9
    assert capsys.readouterr().out == 'check_gaze: 3 of 4 images are not in their logs.\n'
    check_gaze(prepared, show=False)
    assert capsys.readouterr().out == ''

def test_readings_without_any_gaze_are_refused(prepared):
    "All samples lost"
    def lose_all(gaze):
        return gaze.assign(row=np.nan, col=np.nan)
    with pytest.raises(InputError, match='a dwell time of 0 ms on 4 images'):
        check_gaze(with_gaze(prepared, lose_all))
