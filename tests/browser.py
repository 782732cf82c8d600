"""Chromium for tests of pages: serve a folder, open a page, read its console.

with serve(folder) as url, chromium() as driver:
    driver.get(f'{url}/index.html')
    resize(driver, 390)
    assert not console_errors(driver)
"""

import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

# Without a display, and without anything that asks the network on its own.
OPTIONS = [
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-dev-shm-usage',
    '--hide-scrollbars',
]


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        '.js': 'text/javascript',
        '.mjs': 'text/javascript',
        '.wasm': 'application/wasm',
        '.webp': 'image/webp',
    }

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder):
    "The address of a server of `folder`, on a free port of this machine."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(_Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def find_chromium():
    "Chromium and its driver. Where there is none the test is skipped, but never in CI."
    names = ('chromium', 'chromium-browser', 'google-chrome')
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which('chromedriver')
    if browser and driver:
        return browser, driver
    message = 'needs chromium and chromedriver'
    if os.environ.get('CI'):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def chromium(width=1280, height=900, dark=False):
    "A selenium driver of a fresh Chromium."
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver_path = find_chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    profile = tempfile.mkdtemp(prefix='chromium-')
    for option in (*OPTIONS, f'--user-data-dir={profile}'):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        resize(driver, width, height)
        set_dark(driver, dark)
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def resize(driver, width, height=900, scale=1):
    "Make the page `width` CSS pixels wide; a window cannot be narrower than 500."
    metrics = dict(width=width, height=height, deviceScaleFactor=scale, mobile=width < 500)
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)


def set_dark(driver, dark):
    "What `prefers-color-scheme` says."
    scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[scheme]))


def console_errors(driver):
    "What the console of the page has reported since the last call: warnings and errors."
    return [o['message'] for o in driver.get_log('browser') if o['level'] in ('SEVERE', 'WARNING')]


def sideways_scroll(driver):
    "By how many pixels the page is wider than its window."
    root = 'document.documentElement'
    return driver.execute_script(f'return {root}.scrollWidth - {root}.clientWidth')


def call(driver, script, *args):
    "The result of a JavaScript function body that may `await`; its errors are raised here."
    body = (
        'const done = arguments[arguments.length - 1];'
        f'(async (...args) => {{ {script} }})(...[...arguments].slice(0, -1))'
        '.then((value) => done({ value }), (error) => done({ error: String(error) }));'
    )
    result = driver.execute_async_script(body, *args)
    if 'error' in result:
        raise AssertionError(result['error'])
    return result.get('value')


def wait_for_explorers(driver, seconds=20):
    "Until every explorer of the page is ready; an error if one failed."
    from selenium.webdriver.support.ui import WebDriverWait

    states = "return [...document.querySelectorAll('[data-explorer]')].map((o) => o.dataset.state)"

    def settled(driver):
        return set(driver.execute_script(states)) <= {'ready', 'failed'}

    WebDriverWait(driver, seconds).until(settled)
    errors = "return [...document.querySelectorAll('[data-error]')].map((o) => o.dataset.error)"
    assert not driver.execute_script(errors)


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explorers</title><link rel="icon" href="data:,"></head>
<body class="{theme}"><main>{body}</main>
<script type="module" src="explorers/site.js"></script></body></html>
"""


def write_page(folder, *widgets, theme='quarto-light', name='index.html'):
    "A page with explorers as the site has them, in `folder`."
    from cf_guidance.lab import widgets as lab

    (folder / 'explorers').mkdir(parents=True, exist_ok=True)
    for o in {w.explorer for w in widgets}:
        (folder / 'explorers' / f'{o}.js').write_text(lab.bundle(o), encoding='utf-8')
    loader = lab.bundle('site')
    (folder / 'explorers' / 'site.js').write_text(loader, encoding='utf-8')
    body = '\n'.join(w.to_html() for w in widgets)
    (folder / name).write_text(PAGE.format(theme=theme, body=body), encoding='utf-8')
