"""Pictures of the doctor's figures: what is drawn is what was measured, and what is missing is said."""

from __future__ import annotations

from dataclasses import asdict

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_array_equal

from pyro_velo import plots
from pyro_velo.doctor.gradient_record import LEVELS, GradientRecord
from pyro_velo.doctor.gradients import GradientFlow
from pyro_velo.doctor.range_test import RangeTest
from pyro_velo.errors import InputError
from pyro_velo.history import History

NAN = float("nan")
TERMS = {"kl_z": [NAN, 4.0, NAN, 3.0], "unspliced": [NAN, 10.0, NAN, 14.0], "switch_penalty": [NAN, 0.3, NAN, 0.2]}
EPOCHS = [1, 2, 3, 4]
HISTORY = asdict(History(EPOCHS, [1.0] * 4, [NAN, 1, NAN, 2], [1.0] * 4, {"held_out": TERMS, "train": TERMS}))
FLOW = GradientFlow(
    ("kl_z", "unspliced"),
    ("encoder", "times"),
    np.array([[0.5, 0.0], [12.0, 3e-9]]),
    np.array([[0.0, 0.0], [6.0, 1e-9]]),
    np.array([[True, False], [True, True]]),
    draws=10,
)
RECORD = GradientRecord(
    epoch=[1, 2], quantiles={"encoder": [tuple(np.linspace(-2, 0, 5)), tuple(np.linspace(-3, -1, 5))]}, clip=10.0
)
RATES = np.geomspace(1e-4, 1, 30)
RANGE = RangeTest(RATES, 5 - np.log10(RATES) ** 2, 5 - np.log10(RATES) ** 2, 1e-3, True)
PICTURES = {
    "term": lambda ax: plots.elbo_term(HISTORY, "kl_z", ax=ax),
    "flow": lambda ax: plots.gradient_flow(FLOW, ax=ax),
    "record": lambda ax: plots.gradient_record(RECORD, ax=ax),
    "range": lambda ax: plots.range_test(RANGE, ax=ax),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES.keys())
def test_a_picture_is_on_the_ax_given_and_changes_nothing_else(draw):
    settings, figure = dict(mpl.rcParams), Figure()
    ax, other = figure.subplots(1, 2)
    assert draw(ax) is ax
    figure.savefig("/dev/null", format="png")
    assert dict(mpl.rcParams) == settings and ax.has_data() and not other.has_data()


def test_a_term_is_drawn_where_it_was_looked_at():
    lines = plots.elbo_term(HISTORY, "kl_z").lines
    for line in lines:
        assert_array_equal(line.get_xdata(), [2, 4])
        assert_array_equal(line.get_ydata(), [4.0, 3.0])


def test_every_term_has_a_panel_reconstruction_first_and_penalties_last():
    titles = [ax.get_title() for ax in plots.elbo_terms(HISTORY).axes if ax.get_title()]
    assert titles == ["unspliced", "kl_z", "switch_penalty"]


def test_the_matrix_says_its_numbers_and_where_there_are_none():
    words = [text.get_text() for text in plots.gradient_flow(FLOW).texts]
    # 6 of 12 is noise, of ten draws: sqrt(144 - 3.6) / 6.
    assert words == ["0.5", "exact", "·", "12", "snr 2", "3e-09", "snr 3"]


def test_the_record_is_drawn_as_roots_of_mean_squares():
    (line,) = [
        line
        for line in plots.gradient_record(RECORD).lines
        if len(line.get_xdata()) == 2 and line.get_label()[0] != "_"
    ]
    assert_array_equal(line.get_ydata(), 10 ** RECORD.of("encoder")[:, LEVELS.index(0.5)])


def test_what_the_history_does_not_have_is_said():
    with pytest.raises(InputError, match="one of the terms kl_z, unspliced, switch_penalty; got 'kl_w'"):
        plots.elbo_term(HISTORY, "kl_w")
    with pytest.raises(InputError, match="Expected a history with the ELBO's terms; got one without"):
        plots.elbo_terms(HISTORY | {"terms": {}})
