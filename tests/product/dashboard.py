"""The dashboard in headless Chromium: the key, a message typed and streamed, a token chosen, the maps, the keyboard;
at 1280 and 400 pixels, in light and dark. Screenshots go to OUT.

    python dashboard.py ADDRESS API_KEY CHROMIUM OUT
"""

import json
import sys

from playwright.sync_api import expect, sync_playwright

address, key, browser_path, out = sys.argv[1:5]


def without_end(route):
    """The model may end a text when it likes; here it must not, so that there is something to stop."""
    body = json.loads(route.request.post_data)
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True}))


def visit(browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, elsewhere = [], []
    # A refusal for want of a key is what the page is asked to meet.
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "401" not in m.text else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:")) else None)
    page.route("**/v1/chat/completions", without_end)
    page.goto(address)
    expect(page.locator("#key-form")).to_be_visible()
    page.fill("#key", key)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready", timeout=15000)

    # Typed and sent with the keyboard; the text appears piece by piece.
    page.click("#prompt")
    page.fill("#max-tokens", "300")
    page.locator("#prompt").press_sequentially("In the beginning")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".said.user")).to_have_text("In the beginning")
    expect(page.locator(".token").nth(2)).to_be_attached(timeout=30000)
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#state")).to_have_text("at work", timeout=15000)
    page.screenshot(path=f"{out}/dashboard-{width}-{scheme}-streaming.png", full_page=True)
    expect(page.locator(".said.assistant[data-done]")).to_be_attached(timeout=60000)
    assert page.locator(".token").count() > 10

    # A token by mouse, its neighbour by key: the way is drawn, a circle for each MoE layer.
    page.locator(".token:visible").nth(5).click()  # not a line break, which has no width
    pressed = "[...document.querySelectorAll('.token')].findIndex(t => t.getAttribute('aria-pressed') === 'true')"
    chosen = page.evaluate(pressed)
    expect(page.locator("#path circle").first).to_be_visible()
    first = page.locator("#path-note").inner_text()
    assert "MoE layers" in first, first
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(chosen + 1)).to_have_attribute("aria-pressed", "true")
    assert page.locator("#path text[pointer-events]").count() == 8

    # The maps: counted routes, another pair of layers, what lies under the pointer.
    expect(page.locator("#affinity-note")).to_contain_text("tokens counted", timeout=15000)
    page.select_option("#pair", "3")
    expect(page.locator("#affinity-note")).to_contain_text("expert of layer 3", timeout=15000)
    page.locator("#placement").hover(position={"x": 4, "y": 4})
    expect(page.locator("#placement-note")).to_have_text("Layer 0, expert 0: rank 0.")
    assert page.locator("#rank-table tbody tr").count() == 4
    expect(page.locator("#tokens")).not_to_have_text("0")

    # Stopped half-way.
    page.fill("#max-tokens", "400")
    page.fill("#prompt", "And then")
    page.click("#send")
    expect(page.locator(".said.assistant").nth(1).locator(".token").nth(2)).to_be_attached(timeout=30000)
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#state")).to_have_text("ready", timeout=15000)

    wide = page.evaluate("document.documentElement.scrollWidth")
    page.locator(".token:visible").nth(6).click()
    page.screenshot(path=f"{out}/dashboard-{width}-{scheme}.png", full_page=True)
    assert wide <= width, f"the page is {wide} pixels wide at {width}"
    assert not problems, problems
    assert not elsewhere, f"asked others than its server: {elsewhere}"
    page.close()


with sync_playwright() as play:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    browser = play.chromium.launch(executable_path=browser_path, args=arguments)
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            visit(browser, width, scheme)
            print(f"{width} pixels, {scheme}: fine")
    browser.close()
