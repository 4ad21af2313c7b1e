"""The chat page, driven in Chromium: P1-P4 of what a page of a model's answers can get wrong."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import KEYS, Live
from PIL import Image
from scripted import CUT, Script, error, start
from visits import Visit, chromium, picture, sent_picture

from duetvl.serving import page as page_package
from duetvl.serving.page import page_file

FOLDER = Path(page_package.__file__).parent


# -- the files -------------------------------------------------------------------------------------------------------


def test_files_are_served_by_their_paths_alone() -> None:
    index, script = page_file("/"), page_file("/page/app.js")
    assert index and index.content.startswith(b"<!doctype html>") and index.content_type == "text/html; charset=utf-8"
    assert script and script.content_type == "text/javascript; charset=utf-8"
    assert "default-src 'self'" in index.headers["Content-Security-Policy"]
    assert "unsafe" not in index.headers["Content-Security-Policy"]
    for path in ("/page/__init__.py", "/page/", "/page/../page/app.js", "/index.html", "/page/app.js/", ""):
        assert page_file(path) is None, path


def test_what_files_name_is_there() -> None:
    sources = {file.name: file.read_text() for file in FOLDER.iterdir() if file.suffix in (".html", ".css", ".js")}
    index = sources["index.html"]
    named = set(re.findall(r'"(?:\./|page/)([\w.]+)"', "".join(sources.values())))
    assert named >= {"app.js", "style.css", "markdown.js"}
    assert all(page_file(f"/page/{name}") for name in named), named
    script = "".join(text for name, text in sources.items() if name.endswith(".js"))
    icons = set(re.findall(r'con(?:Button)?\("(\w+)"', script)) | set(re.findall(r'href="#icon-(\w+)"', index))
    assert icons and not icons - set(re.findall(r'symbol id="icon-(\w+)"', index))
    ids = set(re.findall(r'(?:byId|getElementById)\("([\w-]+)"\)', script))
    assert ids and not ids - set(re.findall(r' id="([\w-]+)"', index))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


# -- a browser, started once -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    server, address = start(script)
    yield address
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    with Visit(browser, address) as visit:
        yield visit


# -- asking ----------------------------------------------------------------------------------------------------------


def test_a_chat_with_a_picture_outlives_the_page(visit: Visit, script: Script) -> None:
    page = visit.page
    visit.drop("drop", "leaf.png", "image/png", picture())
    visit.count("#thumbnails img", 1)
    visit.drop("paste", "pasted.png", "image/png", picture(32, 32))
    visit.count("#thumbnails img", 2)
    page.set_input_files("#files", [{"name": "third.png", "mimeType": "image/png", "buffer": picture(28, 28)}])
    visit.count("#thumbnails img", 3)
    visit.press("Remove third.png")
    script.answers += [["Ein grünes ", "Blatt 🍃 ", "**von oben**"], ["第二个", "答案"]]
    visit.send("What is this?\nIn German.")
    visit.see(".answer", "Ein grünes Blatt 🍃 von oben")
    visit.see(".statistics", re.compile(r"^tiny-vl · 312 tokens in, 3 out.* · first after \d"))

    page.reload()
    visit.see(".answer", "Ein grünes Blatt 🍃 von oben")
    visit.count(".medium img", 2)
    page.wait_for_selector(".medium img[src^='blob:']")
    assert page.eval_on_selector(".medium img", "image => image.decode().then(() => image.naturalWidth)") == 64
    visit.send("Again")
    visit.see(".answer", "第二个答案")

    first, second = script.requests
    assert first["model"] == "tiny-vl" and first["stream"] and first["stream_options"] == {"include_usage": True}
    assert {"temperature", "seed", "max_tokens", "top_p"}.isdisjoint(first)
    question, answer, again = second["messages"]
    assert first["messages"] == [question]
    assert [part["type"] for part in question["content"]] == ["image_url", "image_url", "text"]
    assert question["content"][2]["text"] == "What is this?\nIn German."
    assert sent_picture(question).size == (64, 48) and sent_picture(question, 1).size == (32, 32)
    assert answer == {"role": "assistant", "content": "Ein grünes Blatt 🍃 **von oben**"}
    assert again == {"role": "user", "content": "Again"}


def test_large_photos_are_scaled_and_what_cannot_be_sent_is_refused(
    visit: Visit, script: Script, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2300, 3000, 3), np.uint8)
    photo = tmp_path / "photo.bmp"
    Image.fromarray(noise).save(photo)
    assert photo.stat().st_size > 20e6
    visit.page.set_input_files("#files", photo)
    visit.count("#thumbnails img", 1)
    visit.drop("drop", "phone.heic", "image/heic", b"no picture")
    visit.see("#note", "This browser cannot read phone.heic (image/heic). Save it as JPEG or PNG and try again.")
    visit.drop("drop", "notes.txt", "text/plain", b"words")
    visit.see("#note", "notes.txt is neither a picture nor a video that can be sent.")
    visit.drop("drop", "empty.png", "image/png", b"")
    visit.see("#note", "empty.png is empty.")
    long = tmp_path / "long.mp4"
    with long.open("wb") as file:
        file.truncate(61_000_000)
    visit.page.set_input_files("#files", long)
    visit.see("#note", "long.mp4 has 61 MB; videos may have 60 MB. Shorten it or lower its resolution.")
    visit.drop("drop", "short.mp4", "video/mp4", b"some bytes")
    visit.count("#thumbnails li", 2)
    script.answers.append(["Noise."])
    visit.send("")
    visit.see(".answer", "Noise.")
    image, video = script.requests[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert sent_picture(script.requests[0]["messages"][0]).size == (2048, 1570)
    assert video == {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,c29tZSBieXRlcw=="}}


def test_settings_and_models_reach_the_server(visit: Visit, script: Script) -> None:
    page = visit.page
    page.select_option("#model", "tiny-vl-adapter")
    visit.press("Settings")
    values = {"system": "Answer briefly.", "temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "7"}
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.fill("#top_p", "9")  # out of bounds: what was valid before stays
    visit.see("#top_p-problem", "A number from 0 to 1.")
    page.keyboard.press("Escape")
    script.answers.append(["Yes."])
    visit.send("Do you see?")
    visit.see(".answer", "Yes.")
    request = script.requests[0]
    assert request["model"] == "tiny-vl-adapter"
    assert request["messages"][0] == {"role": "system", "content": "Answer briefly."}
    numbers = {name: request[name] for name in values if name != "system"}
    assert numbers == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    page.reload()
    visit.see(".answer", "Yes.")
    visit.expect(page.locator("#model")).to_have_value("tiny-vl-adapter")
    assert page.input_value("#seed") == "7"


# -- while an answer is made, and after ------------------------------------------------------------------------------


def test_stop_again_edit_delete(visit: Visit, script: Script) -> None:
    page = visit.page
    hold = threading.Event()
    script.answers += [["First", " part", hold, " never"], ["Second"], ["Third"]]
    visit.send("Tell me")
    visit.see(".answer", "First part")
    assert page.get_attribute(".turn.model", "aria-busy") == "true"
    visit.press("Stop")
    visit.see(".statistics", "stopped")
    assert script.left.wait(20), "the server still answers"
    hold.set()
    visit.press("Answer again")
    visit.see(".answer", "Second")
    visit.see(".picker", "2 / 2")
    visit.press("Earlier version")
    visit.see(".answer", "First part")

    page.press("#message", "ArrowUp")  # the message is empty: the last one is edited
    visit.expect(page.locator("#message")).to_have_value("Tell me")
    page.keyboard.press("Escape")
    visit.expect(page.locator("#message")).to_have_value("")
    page.press("#message", "ArrowUp")
    visit.send("Tell me more")
    visit.see(".answer", "Third")
    visit.count(".turn", 2)
    assert script.requests[-1]["messages"] == [{"role": "user", "content": "Tell me more"}]
    page.get_by_text("Undo").click()
    visit.see(".answer", "First part")
    visit.see(".bubble", "Tell me")

    page.hover(".turn.user")
    visit.press("Delete message and answer")
    visit.count(".turn", 0)
    page.get_by_text("Undo").click()
    visit.count(".turn", 2)


def test_markdown_grows_and_the_page_follows_only_at_the_end(visit: Visit, script: Script) -> None:
    page = visit.page
    fence, more, end = threading.Event(), threading.Event(), threading.Event()
    lines = [f"line {n}\n\n" for n in range(40)]
    script.answers.append(
        ["A **bo", fence, "ld** move:\n\n```python\nprint(", more, "1)\n```\n\n", *lines, end, "last"]
    )
    visit.send("Go")
    visit.expect(page.locator(".answer strong")).to_have_text("bo")
    fence.set()
    visit.see(".answer figure pre", "print(")
    visit.expect(page.locator(".answer strong")).to_have_text("bold")
    kept = page.query_selector(".answer > p")
    more.set()
    visit.see(".answer > p", "line 39")
    assert kept.is_visible() and kept.inner_text() == "A bold move:"  # the same element: only the last is made anew
    at_end = "area => area.scrollHeight - area.scrollTop - area.clientHeight < 2"
    visit.becomes("#scroller", at_end)
    page.set_viewport_size({"width": 1000, "height": 500})  # as a phone's keyboard does
    visit.becomes("#scroller", at_end)
    page.hover("#scroller")
    page.mouse.wheel(0, -600)
    visit.expect(page.locator("#to-end")).to_be_visible()
    end.set()
    visit.see(".statistics", "tokens in")
    visit.see(".answer > p", "last")
    assert not page.eval_on_selector("#scroller", at_end)
    page.click("#to-end")
    visit.expect(page.locator("#to-end")).to_be_hidden()
    page.mouse.wheel(0, -600)
    visit.expect(page.locator("#to-end")).to_be_visible()
    visit.press("Delete answer")
    visit.expect(page.locator("#to-end")).to_be_hidden()  # nothing is left to go to


def test_errors_say_what_happened_and_keep_what_came(visit: Visit, script: Script) -> None:
    hold = threading.Event()
    script.answers += [(429, error("9 requests wait already")), ["Half an ans", hold, CUT], [], ["Whole"]]
    visit.send("Try")
    visit.see(".problem", "The server is busy. 9 requests wait already. Try again in a moment.")
    visit.page.locator(".problem button").last.click()
    visit.see(".answer", "Half an ans")
    hold.set()
    visit.see(".problem", "The connection broke off before the answer was complete.")
    visit.see(".answer", "Half an ans")
    visit.page.reload()
    visit.see(".answer", "Half an ans")
    visit.page.locator(".problem button").last.click()
    visit.see(".statistics", "312 tokens in, 0 out")
    visit.press("Answer again")
    visit.see(".answer", "Whole")
    visit.count(".problem", 0)
    visit.see(".picker", "3 / 3")


def test_an_answer_outlives_a_page_that_is_closed_and_a_server_that_ends(visit: Visit, script: Script) -> None:
    hold = threading.Event()
    script.answers += [["Words that ", hold, "never come"], ["New words"]]
    visit.send("Begin")
    visit.see(".answer", "Words that")
    other = visit.tab()
    other.click("#chats a")
    visit.expect(other.locator(".answer")).to_contain_text("Words that")  # kept while it is made
    visit.page.reload()
    visit.see(".problem", "The page was closed before the answer was complete.")
    visit.see(".answer", "Words that")
    hold.set()
    visit.page.click(".problem button")
    visit.see(".answer", "New words")
    visit.expect(other.locator(".answer")).to_contain_text("New words")
    visit.page.route("**/v1/**", lambda route: route.abort())
    visit.send("Are you there?")
    visit.see(".problem", "The server cannot be reached.")
    visit.page.reload()
    visit.see("#notice", "The server cannot be reached.")
    visit.page.unroute("**/v1/**")
    visit.page.click("#notice button")
    visit.count("#model option", 2)
    visit.expect(visit.page.locator("#notice")).to_be_hidden()


def test_a_key_is_asked_for_once(visit: Visit, script: Script) -> None:
    page = visit.page
    script.key = "a secret"
    page.reload()
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    visit.see("#notice", "This server asks for a key.")
    page.click("#notice button")
    page.fill("#key", "wrong")
    page.get_by_text("Use this key").click()
    visit.see("#key-problem", "The server does not accept this key.")
    page.fill("#key", "a secret")
    page.keyboard.press("Enter")
    visit.count("#model option", 2)
    script.answers.append(["In."])
    visit.send("Hello")
    visit.see(".answer", "In.")
    page.reload()
    visit.count("#model option", 2)
    assert page.evaluate("localStorage.getItem('key')") is None
    other = visit.tab()  # another tab has another session
    other.fill("#key", "a secret")
    other.get_by_text("Remember it").check()
    other.get_by_text("Use this key").click()
    visit.expect(other.locator("#model option")).to_have_count(2)
    visit.expect(visit.tab().locator("#model option")).to_have_count(2)


def test_chats_are_found_renamed_deleted_and_answered_in_the_background(visit: Visit, script: Script) -> None:
    page = visit.page
    hold = threading.Event()
    script.answers += [["Oaks grow", hold, " slowly"], ["Pines."]]
    visit.send("Of oaks")
    visit.see(".answer", "Oaks grow")
    page.click("#new-chat")
    visit.count(".turn", 0)
    visit.count("#chats .running", 1)
    visit.send("Of pines")
    visit.see(".answer", "Pines.")
    hold.set()
    visit.count("#chats .running", 0)
    page.fill("#search", "slowly OAKS")
    visit.count("#chats li", 1)
    page.press("#search", "Enter")
    visit.see(".answer", "Oaks grow slowly")
    page.fill("#search", "")
    page.hover("#chats li:has-text('Of pines')")
    visit.press("Rename Of pines")
    page.keyboard.type("Conifers")
    page.keyboard.press("Enter")
    visit.count("#chats a:has-text('Conifers')", 1)
    page.reload()
    page.hover("#chats li:has-text('Conifers')")
    visit.press("Delete Conifers")
    visit.count("#chats li", 1)
    page.get_by_text("Undo").click()
    visit.count("#chats li", 2)
    visit.see(".answer", "Pines.")
    other = visit.tab()
    visit.expect(other.locator("#chats li")).to_have_count(2)


def test_keys_of_the_keyboard(visit: Visit, script: Script) -> None:
    page = visit.page
    hold = threading.Event()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two?")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    assert page.eval_on_selector("#message", f"field => field.dispatchEvent({composing})")
    assert page.input_value("#message") == "one\ntwo?"
    script.answers.append(["Well", hold])
    page.keyboard.press("Enter")
    visit.see(".answer", "Well")
    page.keyboard.press("Escape")
    visit.see(".statistics", "stopped")
    hold.set()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    visit.expect(page.locator("#keys-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    visit.expect(page.locator("#keys-dialog")).to_be_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+Shift+O")
    visit.count(".turn", 0)
    assert page.evaluate("document.activeElement.id") == "message"


# -- what a model may say --------------------------------------------------------------------------------------------

HOSTILE = """<img src=x onerror=alert(1)> </script><script>alert(2)</script> <svg onload=alert(3)>

[one](javascript:alert(4)) [two](data:text/html,x) [three](//evil.example) ![four](https://evil.example/a.png "t")
<https://evil.example/b> https://evil.example/c_(d). [five](JaVaScRiPt&colon;alert(5)) [six](vbscript:x)

| <iframe src=https://evil.example> | b |
|-|-|
| <a href="javascript:alert(6)">x</a> | ![](https://evil.example/e.png) |

```html"><script>alert(7)</script>
</code></pre><script>alert(8)</script>"""


def test_hostile_answers_are_text(visit: Visit, script: Script) -> None:
    page = visit.page
    script.answers.append([HOSTILE[at : at + 5] for at in range(0, len(HOSTILE), 5)])
    visit.send("<b>bold</b> & </script>")
    visit.see(".statistics", "tokens in")
    assert page.inner_text(".bubble") == "<b>bold</b> & </script>"
    visit.see(".answer > p", "<img src=x onerror=alert(1)> </script><script>alert(2)</script> <svg onload=alert(3)>", 0)
    visit.see(".answer pre", "</code></pre><script>alert(8)</script>")
    assert (
        page.locator(".answer").locator("img, script, iframe, svg:not(.icon), [onerror], [onload], [src]").count() == 0
    )
    links = page.eval_on_selector_all(".answer a", "all => all.map((a) => [a.textContent, a.href, a.rel])")
    assert [text for text, _, _ in links] == [
        "four", "https://evil.example/b", "https://evil.example/c_(d)", "https://evil.example",
        "https://evil.example/e.png",
    ]  # fmt: skip
    assert all(href.startswith("https://evil.example/") and "noopener" in rel for _, href, rel in links)


CASES = {
    "# Title #": "<h3>Title</h3>",
    "Title\n===": "<h3>Title</h3>",
    "a\nb\\\nc": "<p>a<br>b<br>c</p>",
    "**你好。**后 *x*y 2 * 3 * 4 snake_case_name __init__": "<p><strong>你好。</strong>后 <em>x</em>y 2 * 3 * 4"
    " snake_case_name <strong>init</strong></p>",
    "***both*** ~~gone~~ ~one~ **a *b* c**": "<p><em><strong>both</strong></em> <del>gone</del> ~one~"
    " <strong>a <em>b</em> c</strong></p>",
    "`` a`b `` \\*no\\* `<i>`": "<p><code>a`b</code> *no* <code>&lt;i&gt;</code></p>",
    r"costs $5 and $6, but $x_1 * y_1$ and \(a_b * c_d\)": r"<p>costs $5 and $6, but <span>$x_1 * y_1$</span> and"
    r" <span>\(a_b * c_d\)</span></p>",
    "- a\n  - b\n    c\n- d": "<ul><li>a<ul><li>b<br>c</li></ul></li><li>d</li></ul>",
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "3) a\n\n   b\n4) c": "<ol><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>",
    "- [x] a\n- [ ] b": "<ul><li><span>☑</span> a</li><li><span>☐</span> b</li></ul>",
    "born in\n1986. A year": "<p>born in<br>1986. A year</p>",
    "> a\nb\n> - c": "<blockquote><p>a<br>b</p><ul><li>c</li></ul></blockquote>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "|a|b|\n|-|-:|\n|1\\|2|\n|x<br>y|`z`|w|": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
    "<tr><td>1|2</td><td></td></tr><tr><td>x<br>y</td><td><code>z</code></td></tr></tbody></table></div>",
    "see https://a.example/b, [c](https://a.example/d_(e)) [f]": "<p>see <a>https://a.example/b</a>, <a>c</a> [f]</p>",
    "```py\nif x: 'a' # c\n```": "<figure><pre><code><span>if</span> x: <span>'a'</span> <span># c</span></code></pre>"
    "</figure>",
    "~~~\n```\n\tx\n~~~": "<figure><pre><code>```\n\tx</code></pre></figure>",
}
RENDER = """async (cases) => {
  const { GrowingMarkdown } = await import(new URL('page/markdown.js', location.href));
  const strip = (root) => {
    root.querySelectorAll('figcaption').forEach((node) => node.remove());
    root.querySelectorAll('*').forEach((node) => [...node.attributes].forEach((a) => node.removeAttribute(a.name)));
    return root.innerHTML;
  };
  const whole = (text) => {
    const root = document.createElement('div');
    new GrowingMarkdown(root).show(text);
    return strip(root);
  };
  const grown = (text, step) => {
    const root = document.createElement('div');
    const markdown = new GrowingMarkdown(root);
    for (let at = step; at < text.length; at += step) markdown.show(text.slice(0, at), true);
    markdown.show(text);
    return strip(root);
  };
  return cases.map((text) => [whole(text), ...[1, 2, 3, 7].map((step) => grown(text, step))]);
}"""


def test_markdown(visit: Visit) -> None:
    together = "\n\n".join(CASES) + "\r\n\r\nlast\r\n- x\r\n"
    results = visit.page.evaluate(RENDER, [*CASES, together, HOSTILE])
    wrong = {
        text: whole for (text, wanted), (whole, *_) in zip(CASES.items(), results, strict=False) if whole != wanted
    }
    assert not wrong
    for whole, *grown in results:
        assert all(html == whole for html in grown), (whole, grown)


def test_texts_made_to_stall_do_not(visit: Visit) -> None:
    """Each of these takes minutes, or all of the stack, where something is not linear or not bounded."""
    n = 10_000
    texts = [
        "[" * n, "![" * n, "[a](" * n, "<" * n, "http://" * n, "`" * n + "a", "`a``b" * n, "$a " * n, "\\[" * n,
        "*a **b " * n, "*" * n + "a" + "*" * n, "_a" * n, "~~" * n, "#" + " " * n + "x", "|" * n + "\n" + "|-" * n,
        "> " * n + "x", "- " * n + "x", "\n".join("> " * depth for depth in range(200)),
    ]  # fmt: skip
    texts += [f"```js\n{text}" for text in ("'" * n, "/*" * n, '"""' * n)]
    assert len(visit.page.evaluate(RENDER.replace("[1, 2, 3, 7]", "[]"), texts)) == len(texts)


# -- screens ---------------------------------------------------------------------------------------------------------


PHONE = {
    "viewport": {"width": 360, "height": 640}, "color_scheme": "dark", "reduced_motion": "reduce", "has_touch": True,
    "is_mobile": True,
}  # fmt: skip


@pytest.fixture
def phone(browser: Any, address: str) -> Iterator[Visit]:
    with Visit(browser, address, **PHONE) as visit:
        yield visit


def test_a_phone_in_the_dark(phone: Visit, script: Script) -> None:
    visit, page = phone, phone.page
    wide = "| a | b | c | d |\n|-|-|-|-|\n" + "| something long | and more | and yet more | the last |\n" * 3
    code = "```\n" + "x" * 300 + "\n```\n\n" + "w" * 200
    script.answers += [[wide, "\n", code], ["مرحبا **بالعالم**\n\n- واحد"]]
    page.fill("#message", "u" * 200)
    page.keyboard.press("Enter")  # a line, where there is no key for another
    page.click("#send")
    visit.see(".statistics", "tokens in")
    page.fill("#message", "قل مرحبا")
    page.click("#send")
    visit.see(".answer", "مرحبا")
    visit.see(".statistics", "tokens in", nth=1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.eval_on_selector("#scroller", "area => area.scrollWidth <= area.clientWidth")
    directions = "all => all.map((node) => getComputedStyle(node).direction)"
    assert page.eval_on_selector_all(".turn:nth-child(n+3) :is(.bubble, p, ul)", directions) == ["rtl"] * 3
    light = (
        "getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number).reduce((a, b) => a + b) > 384"
    )
    assert page.evaluate(light) is False
    assert page.is_hidden("#sidebar")
    page.click("#open-sidebar")
    visit.expect(page.locator("#search")).to_be_visible()
    page.click("#chats a")
    visit.expect(page.locator("#sidebar")).to_be_hidden()
    visit.press("Light or dark")
    assert page.evaluate(light) is True
    page.reload()
    assert page.evaluate(light) is True
    visit.press("Light or dark")  # the system's own again: the page follows the system
    assert page.evaluate("localStorage.getItem('theme')") is None


# -- a model ---------------------------------------------------------------------------------------------------------


def test_a_model_answers_the_page(browser: Any, live: Live) -> None:
    """The server itself: its key, its models, a picture, the counts of tokens, an answer that is stopped."""
    with Visit(browser, f"http://127.0.0.1:{live.port}/") as visit:
        page = visit.page
        page.fill("#key", KEYS["alice"])
        page.keyboard.press("Enter")
        visit.count("#model option[value='tiny']", 1)
        page.select_option("#model", "tiny")
        visit.press("Settings")
        for name, value in {"max_tokens": "5", "temperature": "0"}.items():
            page.fill(f"#{name}", value)
        page.keyboard.press("Escape")
        visit.drop("drop", "leaf.png", "image/png", picture(84, 56))
        visit.count("#thumbnails img", 1)
        visit.send("What is this?")
        visit.see(".statistics", re.compile(r"^tiny · cut at its token limit · \d+ tokens in, 5 out"))
        url = "data:image/png;base64," + base64.b64encode(picture(84, 56)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        _, answer, _ = live.chat(content, max_tokens=5, temperature=0)
        assert visit.source() == answer["choices"][0]["message"]["content"]
        visit.press("Settings")
        page.fill("#max_tokens", "")
        page.keyboard.press("Escape")
        visit.send("Go on")
        visit.count(".turn.model.answering:not(.waiting)", 1)
        visit.press("Stop")
        visit.see(".statistics", "stopped")
