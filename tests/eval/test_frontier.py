from eval.frontier import STUDENT, mark_frontier


def test_the_frontier_is_what_no_other_setting_of_the_teacher_beats():
    points = {  # evaluations, images a second, distance
        "cheap": (1, 90, 9.0),
        "slow for its evaluations": (2, 10, 5.0),
        "quick for its evaluations": (4, 40, 5.0),
        "beaten": (4, 30, 6.0),
        "best": (8, 20, 3.0),
        "as good, costlier": (9, 15, 3.0),
        STUDENT: (1, 100, 1.0),
    }
    rows = [
        {"sampler": name, "nfe": nfe, "images_per_second": speed, "fd": fd} for name, (nfe, speed, fd) in points.items()
    ]
    mark_frontier(rows, "fd")
    assert [row["sampler"] for row in rows if row["on_frontier"]] == ["cheap", "slow for its evaluations", "best"]
    assert [row["sampler"] for row in rows if row["on_speed_frontier"]] == [
        "cheap",
        "quick for its evaluations",
        "best",
    ]
