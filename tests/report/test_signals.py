from __future__ import annotations

import math

from postlude.report.signals import curve_figure, render

RESULT = {
    "network": "smn",
    "width": 32,
    "numbers": 4451,
    "size": [12, 10],
    "channels": 3,
    "steps": 2000,
    "psnr_float": 31.25,
    "psnr": math.inf,
    "bytes": 3000,
    "notes": ["one channel: fitted as grey"],
}
POINTS = [
    {"line": "nearest", "setting": 8, "bytes": 4000, "psnr": 30.5},
    {"line": "nearest", "setting": 4, "bytes": 2500, "psnr": 21.125},
    {"line": "JPEG", "setting": 91, "bytes": 2400, "psnr": 33.0},
    {"line": "JPEG", "setting": 97, "bytes": 3900, "psnr": math.inf},
]


def test_page() -> None:
    page = render(RESULT, POINTS, {"<the> picture": b"png"}, "postlude fit a.png -o a.inr")
    assert "12 x 10 pixels of 3 channels are 4,451 numbers" in page
    assert "in 3,000 bytes (200.00 bits a pixel) with no error at all" in page
    assert "JPEG of quality 91 shows it with 33.00 dB in 2,400 bytes" in page
    assert "One channel: fitted as grey." in page
    assert "&lt;the&gt; picture" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_curve() -> None:
    figure = curve_figure(POINTS)
    assert [row[:3] for row in figure.rows] == [
        ("nearest", "8", "4,000"),
        ("nearest", "4", "2,500"),
        ("JPEG", "91", "2,400"),
        ("JPEG", "97", "3,900"),
    ]
    for drawing in (figure.plot.wide, figure.plot.narrow):
        assert "size on disk (kB)" in drawing
        assert "PSNR (dB)" in drawing
        assert "nearest" in drawing
