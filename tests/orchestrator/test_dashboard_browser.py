"""The dashboard in a real browser: what it shows is what the API says, live, by keyboard, on a phone, in the dark.

Screenshots lie in `artifacts/dashboard` afterwards.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dashboard_kit import Player, playing
from dashboard_story import WHY, Recording, tell_story
from playwright.async_api import Browser, Page, async_playwright, expect

from orion.common.protocol.records import RunStatus

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.no_cover,
    pytest.mark.asyncio(loop_scope="module"),
]

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SHOTS = Path(__file__).parents[2] / "artifacts/dashboard"
DESKTOP, PHONE = (1440, 900), (390, 844)
WAIT_MS = 15_000

# WCAG: the contrast of every visible text with what lies behind it, as far as plain backgrounds say.
POOR_CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const bright = ([r, g, b]) => [r, g, b].map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let each = element; each !== null; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const skipped = ".hidden, .skip, noscript, title, .span, .uplot, svg .barred";
  for (const element of document.querySelectorAll("body *")) {
    const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!says || element.closest(skipped) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const front = bright(rgba(element instanceof SVGElement ? style.fill : style.color));
    const back = bright(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    const name = `${element.tagName}.${element.getAttribute("class")} "${element.textContent.slice(0, 30)}"`;
    if (ratio < 4.5) found.push(`${name} ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def story() -> Recording:
    return tell_story()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield running
        finally:
            await running.close()


@asynccontextmanager
async def opened(
    browser: Browser, url: str, *, size: tuple[int, int] = DESKTOP, scheme: Any = "light"
) -> AsyncIterator[Page]:
    """A page on which nothing may go wrong: no errors, no messages, no request to anybody else."""
    context = await browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = await context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url[:22]) else troubles.append(request.url))
    await page.goto(url)
    await expect(page.locator("main")).to_be_visible(timeout=WAIT_MS)
    yield page
    assert troubles == []
    await context.close()


async def shoot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


async def status_of(page: Page) -> RunStatus:
    return RunStatus.model_validate_json(await page.evaluate("async () => (await fetch('../v1/status')).text()"))


def figure(page: Page, name: str) -> Any:
    return page.locator(f'[data-figure="{name}"]')


async def test_the_page_says_what_the_api_says_and_follows_it(
    browser: Browser, story: Recording, tmp_path: Path
) -> None:
    async with (
        playing(story, tmp_path, story.marks["step 0"]) as (player, url),
        opened(browser, f"{url}/dashboard/") as page,
    ):
        await expect(page.locator("[data-link]")).to_have_attribute("data-link", "live")
        await agrees(page, player)
        await expect(page.locator(".miner.barred")).to_have_count(0)
        await player.play()
        await expect(page.locator(".miner.barred")).to_have_count(1, timeout=WAIT_MS)
        await agrees(page, player)
        assert await page.locator(".miner.barred").get_attribute("data-hotkey") == story.liar
        assert await page.locator(".miner.gone").get_attribute("data-hotkey") == story.silent
        await expect(figure(page, "Consistency")).to_contain_text("byte-equal")
        await expect(page.locator(".timeline .aside")).to_contain_text("slow upload")
        await expect(page.locator(".log li.bad")).to_contain_text(WHY)
        assert await page.locator(".cell.equal").count() == 3 * story.spec.num_stages
        await shoot(page, "desktop-light")


async def agrees(page: Page, player: Player) -> None:
    """Waits until the page shows the newest state, then compares."""
    status = player.core.status(player.clock.now_s())
    await expect(page.locator(".figures")).to_contain_text(
        f"{status.microbatches_applied} applied, {status.microbatches_cancelled} cancelled", timeout=WAIT_MS
    )
    assert await status_of(page) == status
    losses = [point.loss for point in status.recent_losses[-32:]]
    assert float(await figure(page, "Loss").inner_text()) == pytest.approx(sum(losses) / len(losses), abs=2e-3)
    assert await figure(page, "Checks").inner_text() == str(status.num_checks)
    await expect(page.locator(".figures")).to_contain_text(f"outer step {status.outer_step} of {status.outer_steps}")
    shown = await page.locator(".miner").evaluate_all("each => each.map((one) => one.dataset.hotkey)")
    assert sorted(shown) == sorted(miner.hotkey for miner in status.miners)


async def test_it_works_without_the_stream(browser: Browser, story: Recording, tmp_path: Path) -> None:
    async with (
        playing(story, tmp_path, story.marks["step 0"]) as (player, url),
        opened(browser, f"{url}/dashboard/?poll") as page,
    ):
        await expect(page.locator("[data-link]")).to_have_attribute("data-link", "polling")
        await player.play(story.marks["step 1"])
        await agrees(page, player)


async def test_the_keyboard_leads_everywhere(browser: Browser, story: Recording, tmp_path: Path) -> None:
    async with (
        playing(story, tmp_path, len(story.records)) as (_, url),
        opened(browser, f"{url}/dashboard/") as page,
    ):
        await page.keyboard.press("Tab")
        await expect(page.locator(".skip")).to_be_focused()
        reached: list[str] = []
        for _ in range(60):
            await page.keyboard.press("Tab")
            reached.append(
                await page.evaluate("() => document.activeElement.dataset.hotkey ?? document.activeElement.textContent")
            )
        assert set(reached) >= {miner.hotkey for miner in (await status_of(page)).miners}
        assert reached.count("As a table") >= 5 and "by steps" in reached
        # The table behind a chart holds the numbers that it draws.
        summary = page.locator("section[aria-labelledby=loss-title] summary")
        await summary.focus()
        await page.keyboard.press("Enter")
        rows = page.locator("section[aria-labelledby=loss-title] tbody tr")
        await expect(rows.last).to_be_visible()
        curve = await page.evaluate("async () => (await (await fetch('page')).json()).curves")
        assert await rows.last.locator("td").nth(3).inner_text() == f"{curve['loss'][-1]:.4f}"
        await page.locator(f'[data-hotkey="{story.straggler}"]').focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("h1")).to_have_text(story.straggler)


async def test_a_miner_has_its_pay_explained(browser: Browser, story: Recording, tmp_path: Path) -> None:
    async with (
        playing(story, tmp_path, len(story.records)) as (player, url),
        opened(browser, f"{url}/dashboard/#/miner/{story.liar}") as page,
    ):
        await expect(page.locator(".why")).to_contain_text("A failed check stands", timeout=WAIT_MS)
        pay = player.core.pay(story.liar)
        assert pay.paid_again_from is not None
        await expect(page.locator(".why")).to_contain_text(f"before outer step {pay.paid_again_from}")
        await expect(page.locator(".why .checks .ill").first).to_contain_text(WHY)
        rows = page.locator(".why .scroll tbody tr")
        assert await rows.count() == len(pay.steps)
        newest = pay.steps[-1]
        cells = await rows.first.locator("td").all_inner_texts()
        assert cells[:4] == [
            str(newest.outer_step),
            "–" if newest.stage_index is None else str(newest.stage_index),
            str(newest.num_credited),
            str(newest.num_committed),
        ]
        await shoot(page, "miner-light")
        await page.goto(f"{url}/dashboard/#/miner/{story.straggler}")
        await expect(page.locator("h1")).to_have_text(story.straggler)
        await expect(page.locator(".figures")).to_contain_text("slower than its stage's others")
        await page.get_by_role("link", name="The whole run").click()
        await expect(page.locator(".pipeline")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_scrolls_down_only_and_everything_can_be_read(
    browser: Browser, story: Recording, tmp_path: Path, scheme: str
) -> None:
    async with playing(story, tmp_path, len(story.records)) as (_, url):
        for size, name in ((PHONE, "phone"), (DESKTOP, "desktop")):
            async with opened(browser, f"{url}/dashboard/", size=size, scheme=scheme) as page:
                await expect(page.locator("svg .miner").first).to_be_visible()
                for route in ("#/", f"#/miner/{story.liar}"):
                    await page.evaluate("(route) => { location.hash = route; }", route)
                    shown = page.locator(".pipeline" if route == "#/" else ".why")
                    await expect(shown).to_be_visible(timeout=WAIT_MS)
                    assert await page.evaluate("() => document.documentElement.scrollWidth") <= size[0], route
                    assert await page.evaluate(POOR_CONTRASTS) == [], route
                    await shoot(page, f"{name}-{scheme}{'' if route == '#/' else '-miner'}")


async def test_the_theme_can_be_chosen_and_is_remembered(browser: Browser, story: Recording, tmp_path: Path) -> None:
    async with (
        playing(story, tmp_path, story.marks["step 0"]) as (_, url),
        opened(browser, f"{url}/dashboard/") as page,
    ):
        background = "() => getComputedStyle(document.body).backgroundColor"
        light = await page.evaluate(background)
        await page.get_by_role("button", name="Use the dark theme").click()
        dark = await page.evaluate(background)
        assert dark != light
        await page.reload()
        await expect(page.locator("main")).to_be_visible()
        assert await page.evaluate(background) == dark
