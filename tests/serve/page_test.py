"""The page in a real browser against a real server: streaming, stop, edit, probabilities, keys, themes and widths."""

import math
import os
import shutil
import time

import jax
import openai
import pytest

from tests.serve.servers import running, tiny, tiny_chat, until

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
             --disable-component-update --disable-sync --disable-dev-shm-usage""".split()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """A page of the server. Any other address that it asks for, and any error in its program, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 700})
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(10_000)
    open_page(page, server[0])
    yield page
    context.close()
    assert not errors and {url.split("/")[0] for url in asked} <= {"http:", "data:"}
    assert all(url.startswith((server[0], "data:")) for url in asked)


def open_page(page, address):
    page.goto(address)
    until(lambda: page.locator("#model").inner_text() == "tiny")


def say(page, text, **settings):
    """Send a message and wait for its reply."""
    for name, value in settings.items():
        page.locator(f"[data-setting={name}]").fill(str(value))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def finished(page):
    page.locator(".assistant:last-child .note", has_text="token").wait_for()
    until(lambda: page.evaluate("running === null"))


def texts(page, kind):
    return page.locator(f".{kind} .text").all_text_contents()


def test_a_reply_and_its_probabilities_are_those_of_the_api(page, server):
    say(page, "Hello", temperature=0, max_tokens=12)
    finished(page)
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")
    hello = [{"role": "user", "content": "Hello"}]
    want = client.chat.completions.create(
        model="tiny", messages=hello, temperature=0, max_tokens=12, logprobs=True, top_logprobs=5
    ).choices[0]
    assert texts(page, "assistant") == [want.message.content] and len(want.message.content) > 3
    # Every token of the reply is in a span of its text, with its alternatives.
    spans = page.evaluate("[...document.querySelectorAll('.token')].map(x => [x.textContent, x.tokens])")
    assert "".join(text for text, _ in spans) == want.message.content
    shown = [token for _, tokens in spans for token in tokens]
    assert [x["text"] for x in shown] == [x.token for x in want.logprobs.content]
    for x, y in zip(shown, want.logprobs.content, strict=True):
        assert math.isclose(x["logprob"], y.logprob, abs_tol=1e-5)
        assert [z["text"] for z in x["best"]] == [z.token for z in y.top_logprobs]
    # By pointing, and by keys alone.
    page.locator(".token").first.hover()
    assert page.locator("#tip tbody tr").count() >= 5
    first = want.logprobs.content[0]
    assert float(page.locator("#tip .chosen td").first.inner_text().split()[0]) == pytest.approx(
        100 * math.exp(first.logprob), rel=0.05
    )
    page.mouse.move(2, 2)
    page.locator("#tip").wait_for(state="hidden")
    page.locator("#prompt").focus()
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.assistant .text')"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.token')].findIndex(x => x.matches('.active'))") == 1
    assert page.locator("#tip").is_visible() and "Others" in page.locator("#announce").text_content()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_stop_frees_the_slot_and_keeps_the_text(page, server, monkeypatch):
    service = server[1]
    step = service.engine._start_step
    monkeypatch.setattr(service.engine, "_start_step", lambda: (time.sleep(0.05), step()))
    say(page, "Count", temperature=0, max_tokens=190)
    page.locator(".token").first.wait_for()
    page.locator("#stop").click()
    until(lambda: service.unfinished == 0)
    assert "stopped" in page.locator(".note").last.inner_text()
    kept = texts(page, "assistant")[0]
    page.wait_for_timeout(300)
    assert texts(page, "assistant") == [kept] and kept
    assert page.locator("#send").is_visible() and page.evaluate("document.activeElement.id") == "prompt"


def test_an_edited_message_replaces_what_follows(page):
    for text in ("One", "Two", "Three"):
        say(page, text, temperature=0, max_tokens=4)
        finished(page)
    replies = texts(page, "assistant")
    page.locator(".user", has_text="Two").get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")  # nothing changes
    assert texts(page, "user") == ["One", "Two", "Three"] and texts(page, "assistant") == replies
    page.locator(".user", has_text="Two").get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("<b>2</b>")
    page.keyboard.press("Enter")
    finished(page)
    assert texts(page, "user") == ["One", "<b>2</b>"] and len(texts(page, "assistant")) == 2
    assert page.evaluate("messages.map(x => x.role).join()") == "user,assistant,user,assistant"
    assert texts(page, "assistant")[0] == replies[0] and page.locator("b b, .text b").count() == 0
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0 and page.evaluate("messages.length") == 0


def test_mistakes_are_shown(page):
    say(page, "Hello", max_tokens=2**31)
    page.get_by_role("alert").wait_for()
    assert "max_tokens" in page.get_by_role("alert").inner_text()
    page.locator("[data-setting=max_tokens]").fill("2")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert page.get_by_role("alert").count() == 0 and len(texts(page, "assistant")) == 1
    say(page, "Again", temperature=-1)  # the browser refuses it
    assert len(texts(page, "user")) == 1


def test_a_message_after_an_error_is_one_turn_with_the_one_before(page):
    say(page, "Hello", max_tokens=2**31)
    page.get_by_role("alert").wait_for()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Are you there?", max_tokens=2)
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Hello\n\nAre you there?"}]
    finished(page)
    assert texts(page, "user") == ["Hello", "Are you there?"] and page.get_by_role("alert").count() == 0


def test_a_model_without_a_template_continues_texts(browser):
    with running(tiny(), slots=1, name="tiny", api_key="secret") as (address, _):
        page = browser.new_page()
        page.goto(address)
        until(lambda: page.locator("#model").inner_text() == "needs an API key")
        page.locator("[data-setting=key]").fill("secret")
        page.keyboard.press("Tab")
        until(lambda: page.locator("#model").inner_text() == "tiny")
        say(page, "abc ", max_tokens=5, temperature=0)
        finished(page)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        ask = lambda text: client.completions.create(model="tiny", prompt=text, max_tokens=5, temperature=0)
        first = ask("abc ").choices[0].text
        assert texts(page, "assistant") == [first]
        say(page, "")  # continues
        until(lambda: page.locator(".assistant .note:not(:empty)").count() == 2)
        assert texts(page, "assistant") == [first, ask("abc " + first).choices[0].text]
        page.close()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(address, http.Service) of a chat model of three layers, whose heads differ."""
    run = tiny_chat(tmp_path_factory.mktemp("deep"), layers=3)
    run.params = jax.tree.map(lambda x: 5 * x, run.params)
    with running(run, slots=2, name="tiny") as found:
        yield found


def test_attention_by_pointer_and_keys(browser, deep):
    address, asked = deep[0], []
    page = browser.new_page()
    page.on("request", lambda r: r.url.endswith("/v1/attention") and asked.append(r.post_data_json))
    page.set_default_timeout(10_000)
    open_page(page, address)
    page.locator("[data-setting=format]").select_option("json_schema")  # a random model's own tokens are invisible
    say(page, "Hello, World", temperature=0, schema='{"const": "I see you"}')
    finished(page)
    page.locator(".token").first.hover()
    assert not asked and page.locator("#attention").is_hidden()  # nothing is computed before it is asked for
    [ids] = page.evaluate("messages.filter(x => x.ids).map(x => [x.promptIds, x.ids])")
    percents = lambda: [float(x.strip("< %")) for x in page.locator("#most b").all_text_contents()]

    def shown(at, **chosen):
        """Whether the list has the largest weights that the API gives."""
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            body = dict(prompt=ids[0], completion=ids[1], position=at) | chosen
            weights = client.post("/attention", body=body, cast_to=object)["weights"]
        return percents() == pytest.approx([100 * x for x in sorted(weights)[:-6:-1]], abs=0.11)  # shown: 12.3 %

    button = page.get_by_role("button", name="Attention", exact=True)
    button.click()
    until(lambda: shown(page.evaluate("looked.token.at")) and button.get_attribute("aria-pressed") == "true")
    page.locator(".token").nth(2).hover()
    until(lambda: shown(2))
    page.locator(".token").nth(1).click()
    until(lambda: shown(1))
    page.locator(".token").nth(3).hover()  # the second token stays until another click
    page.wait_for_timeout(200)
    assert page.evaluate("looked.token.at") == 1
    # What the model had read: the template's tokens and those of the reply.
    read = page.locator("#read .token").all_text_contents()
    assert len(read) == len(ids[0]) + 1 and {"<|im_start|>", "<|im_end|>"} <= {*read}
    assert "Hello, World" in page.locator("#read").text_content()
    # By keys alone: the layer, the head, the weights of single tokens, another token of the reply, the end.
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    until(lambda: shown(1, layer=0))
    assert page.locator("#layer").get_attribute("aria-valuetext") == "0"
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    until(lambda: shown(1, layer=2, head=1))
    first, most = page.locator("#most li").first.text_content().split(" ", 1)
    assert f": {first} {most}," in page.locator("#announce").text_content()
    page.locator("#read").focus()
    page.keyboard.press("Home")
    assert page.locator("#announce").text_content().endswith("%") and "got" in page.locator("#tip").inner_text()
    page.locator(".assistant .text").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    until(lambda: shown(2, layer=2, head=1) and "Others: " in page.locator("#announce").text_content())
    page.locator("#head").focus()
    page.keyboard.press("Escape")
    assert page.locator("#attention").is_hidden() and page.evaluate(
        "document.activeElement.matches('.assistant .text')"
    )
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(lambda: page.locator("#attention").is_visible() and page.evaluate("looked?.token.at") == 0)
    page.get_by_role("button", name="New chat").click()
    assert page.locator("#attention").is_hidden() and len(asked) < 12
    page.close()


def test_attention_of_bytes_and_sinks_and_its_absence(page):
    """What the page makes of answers that this server does not give."""
    say(page, "Hello", temperature=0, max_tokens=6)
    finished(page)
    answer = {"tokens": ["a", "bytes:\\xe2\\x80", "bytes:\\xa6", "<s>"], "weights": [0.1, 0.2, 0.3, 0.15]}
    page.route("**/v1/attention", lambda route: route.fulfill(json=answer | {"special": [3], "rest": 0.25}))
    page.locator(".token").last.click()
    page.get_by_role("button", name="Attention", exact=True).click()
    until(lambda: page.locator("#most li").count() == 4)
    assert page.locator("#most li").all_text_contents() == ["… 50.0 %", "<s> 15.0 %", "a 10.0 %", "no token 25.0 %"]
    assert page.locator("#read .token").all_text_contents() == ["a", "…", "<s>"]
    page.unroute("**/v1/attention")
    error = {"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
    page.route("**/v1/attention", lambda route: route.fulfill(status=429, json=error))
    page.locator(".token").first.click()
    until(lambda: page.locator("#attention-note").inner_text() == "the queue is full")
    model = page.evaluate("model") | {"attention": {"layers": [], "heads": 0, "missing": "all layers keep a state"}}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [model]}))
    page.reload()
    until(lambda: page.locator("#no-attention").is_visible())
    for name in ("#no-attention", "#has-attention"):  # in the settings, and in the empty conversation
        assert page.locator(name).inner_text() == "No attention to show: all layers keep a state."
    say(page, "Hello", temperature=0, max_tokens=2)
    finished(page)
    assert page.get_by_role("button", name="Attention", exact=True).count() == 0


CONTRAST = """() => {
  const part = x => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; };
  const numbers = c => { const found = c.match(/[\\d.]+/g).map(Number); return [...found.slice(0, 3), found[3] ?? 1]; };
  const light = c => { const [r, g, b] = c.map(part); return .2126*r + .7152*g + .0722*b; };
  const back = x => { const over = [];  // translucent colours over the first opaque one
    for (; x && over.at(-1)?.[3] !== 1; x = x.parentElement) over.push(numbers(getComputedStyle(x).backgroundColor));
    return over.reverse().reduce((a, b) => a.map((v, i) => v * (1 - b[3]) + b[i] * b[3])); };
  return [...document.querySelectorAll('button, label, .text, .note, .who b, small, #model, input, label i, .looked, ' +
    '#attention h2, #attention p, #most span, #most b, #read .token, #read .next')].filter(
    x => x.checkVisibility()).map(x => { const [a, b] = [light(numbers(getComputedStyle(x).color)), light(back(x))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), x.outerHTML.slice(0, 80)]; });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_both_themes_and_a_phone(browser, server, theme, width):
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 700})
    page = context.new_page()
    open_page(page, server[0])
    page.evaluate("fields.max_tokens.value = 20; fields.temperature.value = 0")  # a drawn reply may be empty
    say(page, "A message of several words, and " + "onelongwordthatdoesnotfitintothewidthofaphone" * 2)
    finished(page)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (theme == "light")
    page.get_by_role("button", name="Attention", exact=True).click()
    until(lambda: page.locator("#read .token").count() > 20)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{theme}-{width}-attention.png")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 50 and min(ratios)[0] >= 4.5, min(ratios)  # WCAG 2.2, level AA
    page.keyboard.press("Escape")
    if width == 360:
        assert page.locator("#settings").is_hidden()
        page.get_by_role("button", name="Settings").click()
    assert page.locator("#settings").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 20 and min(ratios)[0] >= 4.5, min(ratios)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter(x => !x.labels.length).length"
    )
    assert unnamed == 0
    page.locator("#theme").click()  # system, light, dark
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 28)"
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{theme}-{width}.png")
    context.close()
