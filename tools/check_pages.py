"""Open every page of a built site in Chromium, at 1280 and 390 pixels, light and dark, and print
what is wrong: overflow, errors, broken links and pictures, missing alt text, raw formulas.

    python tools/check_pages.py _docs --screenshots folder
"""

import argparse
import base64
import json
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

LOOK = (Path(__file__).parent / 'check_pages.js').read_text(encoding='utf-8')
WIDTHS = {1280: 800, 390: 844}
TALL = 8_000  # pixels of a page that go into one screenshot
SWITCHES = """headless=new no-sandbox disable-gpu no-first-run disable-background-networking
disable-component-update disable-sync disable-dev-shm-usage hide-scrollbars""".split()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(site):
    "The address at which the folder `site` is served."
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}/'
        finally:
            server.shutdown()


@contextmanager
def chromium():
    "A headless Chromium that keeps its console and the addresses it asks for."
    options = webdriver.ChromeOptions()
    options.page_load_strategy = 'eager'
    options.binary_location = shutil.which('chromium') or shutil.which('google-chrome') or ''
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # other hosts are not found, so that a page that needs one shows it
        hosts = 'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
        for switch in [*SWITCHES, hosts, f'user-data-dir={profile}']:
            options.add_argument(f'--{switch}')
        driver = webdriver.Chrome(options=options, service=Service(shutil.which('chromedriver')))
        try:
            yield driver
        finally:
            driver.quit()


def resize(driver, width):
    size = dict(width=width, height=WIDTHS[width], deviceScaleFactor=1, mobile=width < 600)
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)


def colours(driver, mode):
    feature = dict(name='prefers-color-scheme', value=mode)
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[feature]))


STILL = "document.head.append(Object.assign(document.createElement('style'), {textContent: \
'*, ::before, ::after {transition: none !important; animation: none !important}'}))"


def settle(driver):
    "Wait until the page has loaded all it asks for and has been drawn."
    until = time.monotonic() + 20
    ready = """const done = (css, f) => [...document.querySelectorAll(css)].every(f);
      return document.readyState === 'complete' && done('img', (e) => e.complete)
        && done('[data-explorer]', (e) => /ready|failed/.test(e.dataset.state));"""
    while not driver.execute_script(ready) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.12)  # smalldocs changes colours 50 ms after the mode


def screenshot(driver, path):
    size = driver.execute_script('return [innerWidth, document.documentElement.scrollHeight]')
    clip = dict(x=0, y=0, width=size[0], height=min(size[1], TALL), scale=1)
    wanted = dict(format='jpeg', quality=70, captureBeyondViewport=True, clip=clip)
    data = driver.execute_cdp_cmd('Page.captureScreenshot', wanted)['data']
    path.write_bytes(base64.b64decode(data))


def complaints(driver):
    "Errors in the console since the last call."
    entries = driver.get_log('browser')
    return [('console', e['message'][:200]) for e in entries if e['level'] == 'SEVERE']


def strangers(driver, home):
    "Addresses on other hosts that the page asked for since the last call."
    for entry in driver.get_log('performance'):
        message = json.loads(entry['message'])['message']
        if message['method'] == 'Network.requestWillBeSent':
            url = message['params']['request']['url']
            if url.startswith(('http:', 'https:', 'ws:', 'wss:')) and not url.startswith(home):
                yield 'other host', url[:160]


def look(driver, home, page, folder, patience=1):
    "The problems of one page as (view, kind, what), and the facts of its widest view."
    found, facts = [], {}
    for width in WIDTHS:
        resize(driver, width)
        colours(driver, 'light')
        driver.get(home + page)
        driver.execute_script(STILL)
        for mode in ('light', 'dark'):
            view = f'{width} {mode}'
            colours(driver, mode)
            settle(driver)
            seen = driver.execute_script(LOOK, width >= 1000, mode == 'light')
            if seen['problems']:  # on a busy machine a page may still be changing its colours
                time.sleep(patience)
                seen = driver.execute_script(LOOK, width >= 1000, mode == 'light')
            facts[view] = seen['facts']
            found += [(view, *p) for p in seen['problems']]
            found += [(view, *p) for p in [*complaints(driver), *strangers(driver, home)]]
            if folder:
                name = page.removesuffix('.html').replace('/', '_')
                screenshot(driver, folder / f'{name}_{width}_{mode}.jpg')
    return found, facts


def broken_links(site, home, facts):
    "Links inside the site that lead to no file or to no section, as (page, link)."
    ids = {page: set(f['ids']) for page, f in facts.items()}
    for page, f in facts.items():
        for link in f['links']:
            if not link.startswith(home):
                continue
            url = urlsplit(link)
            path = unquote(url.path).lstrip('/')
            if path.endswith('/') or not path:
                path += 'index.html'
            section = unquote(url.fragment)
            if not (site / path).is_file():
                yield page, link.removeprefix(home)
            elif section and path in ids and section not in ids[path]:
                yield page, link.removeprefix(home)


def check(site, folder=None, pages=None, patience=1):
    """Problems of a site as (page, view, kind, what), and the facts of each page.

    Where there is a problem, it looks again after `patience` seconds.
    """
    if not pages:
        files = sorted(site.rglob('*.html'))
        pages = [f.relative_to(site).as_posix() for f in files if 'site_libs' not in f.parts]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    problems, facts = [], {}
    with served(site) as home, chromium() as driver:
        for page in pages:
            found, facts[page] = look(driver, home, page, folder, patience)
            problems += [(page, *p) for p in found]
    wide = {page: f['1280 light'] for page, f in facts.items()}
    problems += [(page, '', 'broken link', link) for page, link in broken_links(site, home, wide)]
    return problems, facts


def summary(site, problems, facts):
    "The numbers that tell how good a site is."

    def count(*kinds):
        return sum(p[2] in kinds for p in problems)

    wide = [f['1280 light'] for f in facts.values()]
    size = sum(f.stat().st_size for f in site.rglob('*') if f.is_file()) / 1e6
    return [
        f'pages {len(facts)}, megabytes {size:.1f}',
        f'boxes that overflow {count("sideways", "overflow")}, lines that do not fit at 1280 '
        f'pixels {count("long line") // 2} (in {sum(f["boxes"] for f in wide)} boxes)',
        f'console errors {count("console")}, requests to other hosts {count("other host")}',
        f'broken links {count("broken link")}, pictures without alt text {count("no alt text")}',
        f'formulas not rendered {count("formula", "raw TeX")}',
        f'pages without badge {sum(not f["badge"] for f in wide)}',
        f'highest page {max(f["height"] for f in wide)} pixels',
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('site', type=Path, nargs='?', default=Path('_docs'))
    parser.add_argument('--screenshots', type=Path, help='a folder for pictures of all pages')
    parser.add_argument('--pages', nargs='*', help='only these, such as lessons/part5.html')
    args = parser.parse_args()
    problems, facts = check(args.site.resolve(), args.screenshots, args.pages)
    merged = {}
    for page, view, kind, what in problems:
        merged.setdefault((page, kind, what), []).append(view)
    for (page, kind, what), views in merged.items():
        print(f'{page} ({", ".join(filter(None, views))}): {kind}: {what}')
    print(*summary(args.site, problems, facts), sep='\n')
    print(f'{len(merged)} problems')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
