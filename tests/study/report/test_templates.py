"""Pages are made of templates, which the package ships."""

from importlib import resources

from markupsafe import Markup

from lth_plugins.study.report import templates


def test_the_templates_are_resources_of_the_package() -> None:
    folder = resources.files("lth_plugins.study.report") / "templates"
    for name in ("page.html", "parts.html", "style.css"):
        assert (folder / name).read_text()
    page = templates.page("<title>", [Markup("<p>body</p>")])
    assert "<title>&lt;title&gt;</title>" in page and "\n<p>body</p>\n" in page
    assert (folder / "style.css").read_text().strip() in page


def test_text_is_escaped_and_markup_is_not() -> None:
    row = ("<i>", templates.link("<a>", "#b"))
    for made in (
        templates.table(["<b>"], [row]),
        templates.grouped(["<b>"], [("id", "<b>", [row])], "<b>"),
    ):
        assert "&lt;b&gt;" in made and "&lt;i&gt;" in made and "<b>" not in made
        assert '<a href="#b">&lt;a&gt;</a>' in made
    for made in (
        templates.heading("<b>"),
        templates.paragraph("<b>", "soft"),
        templates.bullets(["<b>"]),
        templates.details("<b>", templates.code("<b>"), templates.command("<b>")),
        templates.alarm("<b>"),
        templates.figure(b"<svg/>", 'an "alt"', "<b>"),
    ):
        assert "&lt;b&gt;" in made and "<b>" not in made
