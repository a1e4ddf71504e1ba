"""Plots: what is drawn is what the records say, beside readable labels."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import block_manager, plot
from jpaged.outputs import RequestOutput
from jpaged.plot import curves, style
from jpaged.serving.metrics import Event, StepRecord

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _files_only(monkeypatch):
    matplotlib.use("agg")
    yield
    style.pyplot().close("all")


def record(step, **counts):
    zeros = dict.fromkeys(StepRecord._fields, 0)
    return StepRecord(**zeros | dict(step=step, time_s=10 + step / 10) | counts)


STEPS = [
    record(1, num_token_states=20, num_reserved_slots=12, num_running=2),
    record(2, num_token_states=24, num_reserved_slots=8, num_waiting=3),
    record(3, num_token_states=28, num_reserved_slots=4, num_saved_blocks=1),
]


def outputs():
    names = ("queued", "scheduled", "first_token", "preempted", "scheduled", "finished")
    events = [Event(name, 10.0 + i, i) for i, name in enumerate(names)]
    late = [Event("queued", 12.0, 2), Event("scheduled", 12.0, 2)]
    late += [Event("first_token", 13.0, 3), Event("finished", 15.0, 5)]
    return [
        RequestOutput(i, None, [1], [], events=e) for i, e in enumerate((late, events))
    ]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def is_beside(ax):
    """Whether the legend is to the right of the axes."""
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    return box.x0 >= ax.get_window_extent().x1 - 1


def areas(ax):
    """The top of each filled area at the last x."""
    found = []
    for area in ax.collections:
        vertices = area.get_paths()[0].vertices
        found.append(vertices[vertices[:, 0] == vertices[:, 0].max(), 1].max())
    return found


def test_occupancy_stacks_shares_of_the_pool():
    ax = plot.occupancy(STEPS, num_blocks=4, block_size=16)
    assert areas(ax) == pytest.approx([100 * 28 / 64, 50, 50 + 25])
    assert ax.get_xlabel() == "time (s)"
    assert ax.get_ylabel() == "KV slots (% of the pool)"
    assert legend(ax) == ["token states", "reserved", "saved by sharing", "whole pool"]
    assert is_beside(ax)
    assert ax.get_xlim() == pytest.approx((0, 0.2))
    with pytest.raises(ValueError, match="num_blocks, block_size: expected both"):
        plot.occupancy(STEPS)
    with pytest.raises(ValueError, match="at least one step"):
        plot.occupancy([], num_blocks=4, block_size=16)
    llm = types.SimpleNamespace(
        timeline=lambda: STEPS, config=types.SimpleNamespace(num_blocks=4, block_size=4)
    )
    assert areas(plot.occupancy(llm, block_size=16)) == areas(ax)  # what is given wins


def test_the_timeline_divides_each_request_into_its_phases():
    ax = plot.timeline(outputs())
    bars = {
        container.get_label(): [
            tuple(
                round(at, 6)
                for at in (bar.get_y() + 0.35, bar.get_x(), bar.get_width())
            )
            for bar in container
        ]
        for container in ax.containers
    }
    # By arrival: the second output is the first row.
    assert bars["waiting"] == [(0, 0, 1), (0, 3, 1), (1, 2, 0)]
    assert bars["computing the prompt"] == [(0, 1, 1), (1, 2, 1)]
    assert bars["decoding"] == [(0, 2, 1), (0, 4, 1), (1, 3, 2)]
    assert {"first token", "preempted"} <= set(legend(ax))
    assert is_beside(ax)
    with pytest.raises(ValueError, match="with events, got none"):
        plot.timeline([RequestOutput(0, None, [1], [])])


def test_a_live_load_has_three_panels_with_one_time_axis():
    figure = plot.live_load(STEPS, outputs(), num_blocks=4, block_size=16)
    memory, counts, requests = figure.axes
    assert memory.get_xlim() == counts.get_xlim() == requests.get_xlim()
    assert [line.get_label() for line in counts.lines] == ["running", "waiting"]
    assert counts.lines[1].get_ydata().tolist() == [0, 3, 0]


def test_block_tables_show_numbers_sharing_and_changes():
    append, fork = jax.jit(block_manager.append), jax.jit(block_manager.fork)
    state = block_manager.init_state(
        num_blocks=6, block_size=4, max_seqs=2, max_blocks_per_seq=3
    )
    first, _ = append(state, jnp.array([6, 0]))
    first = jax.tree.map(jnp.array, first)
    second = jax.tree.map(jnp.array, fork(first, jnp.array([0, 0])))
    third, _ = append(jax.tree.map(jnp.array, second), jnp.array([1, 1]))
    figure = plot.block_tables([first, second, third], names=["a", "b"])
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    pool = [str(block) for block in range(6)]
    assert texts[0][:3] == ["0", "1", "a: 6"]
    assert texts[1][:6] == ["0", "1", "a: 6", "0", "1", "b: 6"]
    assert texts[2][:6] == ["0", "2", "a: 7", "0", "1", "b: 7"]
    assert all(one[-7:-1] == pool for one in texts)

    def changes(ax):
        red = matplotlib.colors.to_rgba(style.RED)
        return sum(patch.get_edgecolor() == red for patch in ax.patches)

    assert [changes(ax) for ax in figure.axes] == [0, 2, 1]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["free", "1 sequence", "shared by 2", "changed"]
    with pytest.raises(ValueError, match="one for each of 1 states, got 2"):
        plot.block_tables(first, titles=["a", "b"])


def test_curves_show_means_and_student_s_intervals():
    points = [(1, 2.0), (1, 4.0), (1, 3.0), (2, 5.0)]
    x, mean, half = curves.mean_and_interval(points)
    assert x.tolist() == [1, 2]
    assert mean.tolist() == [3.0, 5.0]
    # 4.302653 is the quantile of two degrees of freedom in any table.
    assert half == pytest.approx([4.302653 * 1 / np.sqrt(3), 0])
    ax = plot.latency_rate({"a": points, "b": [(1, 1.0)]}, y_max=10, level=0.5)
    assert ax.get_ylim() == (0, 10)
    assert ax.get_xlabel() == "request rate (requests/s)"
    assert legend(ax) == ["0.5 s", "a", "b"]
    assert is_beside(ax)
    colors = {line.get_color() for line in ax.lines}
    assert len(colors) == 3


def test_hit_ratios_are_percentages_at_the_capacities():
    points = [(1000, 0.1), (10_000, 0.25), (50_000, 0.5)]
    ax = plot.hit_ratio({"LRU": points}, optimum=[(x, y + 0.1) for x, y in points])
    best, line = ax.lines
    assert line.get_ydata().tolist() == pytest.approx([10, 25, 50])
    assert best.get_ydata().tolist() == pytest.approx([20, 35, 60])
    ticks = [text.get_text() for text in ax.get_xticklabels()]
    assert ticks == ["1,000", "10,000", "50,000"]
    assert ax.get_xlabel() == "capacity (blocks)"
    assert plot.hit_ratio(points).lines[0].get_label() == "hit ratio"


def test_given_axes_are_drawn_on_and_a_file_has_the_same_bytes(tmp_path):
    figure, panels = style.new_figure(1, 2)
    assert plot.hit_ratio([(1, 0.5)], ax=panels[0, 1]) is panels[0, 1]
    style.save(figure, tmp_path / "a.png")
    again, panels = style.new_figure(1, 2)
    plot.hit_ratio([(1, 0.5)], ax=panels[0, 1])
    style.save(again, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
