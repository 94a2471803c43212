"""Headless Chromium by WebDriver's plain protocol, of which the tests of the page need little."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
_FLAGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync',
  '--disable-dev-shm-usage', '--autoplay-policy=no-user-gesture-required',
)  # fmt: skip
_ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'  # the protocol's key of an element's name


class Browser:
  """A browser with an empty profile, to be closed."""

  def __init__(self, profile, *flags, mobile=None):
    """mobile: metrics of a phone, {'width', 'height', 'pixelRatio'}; flags: further ones."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    self._driver = subprocess.Popen(
      [DRIVER, f'--port={port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    self._address = f'http://127.0.0.1:{port}'
    options = {'binary': CHROMIUM, 'args': [*_FLAGS, f'--user-data-dir={profile}', *flags]}
    if mobile:
      options['mobileEmulation'] = {'deviceMetrics': mobile}
    capabilities = {
      'goog:chromeOptions': options,
      'goog:loggingPrefs': {'browser': 'ALL'},
      'timeouts': {'script': 600_000, 'pageLoad': 300_000},
    }
    try:
      self._wait_for_driver()
      session = self._call('POST', '', {'capabilities': {'alwaysMatch': capabilities}})
      self._address += f'/{session["sessionId"]}'
    except BaseException:
      self._driver.kill()
      raise

  def _wait_for_driver(self):
    address = self._address
    self._address += '/session'
    for _ in range(600):
      try:
        with urllib.request.urlopen(f'{address}/status') as answer:
          if json.load(answer)['value']['ready']:
            return
      except urllib.error.URLError:
        time.sleep(0.1)
    raise RuntimeError('chromedriver does not start')

  def _call(self, method, path, value=None):
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(self._address + path, data, method=method)
    request.add_header('Content-Type', 'application/json')
    try:
      with urllib.request.urlopen(request) as answer:
        return json.load(answer)['value']
    except urllib.error.HTTPError as error:
      raise RuntimeError(json.load(error)['value']['message']) from None

  def open(self, address):
    self._call('POST', '/url', {'url': address})

  def run(self, body, *arguments):
    """What an async function with this body returns, with `arguments` as its `given`."""
    script = (
      'const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);'
      f'(async () => {{ {body} }})()'
      '.then((value) => done({ value }), (error) => done({ error: String(error) }));'
    )
    answer = self._call('POST', '/execute/async', {'script': script, 'args': arguments})
    if 'error' in answer:
      raise RuntimeError(answer['error'])
    return answer.get('value')

  def choose_file(self, selector, path):
    found = self._call('POST', '/element', {'using': 'css selector', 'value': selector})
    self._call('POST', f'/element/{found[_ELEMENT]}/value', {'text': str(path)})

  def resize(self, width, height):
    self._call('POST', '/window/rect', {'width': width, 'height': height})

  def screenshot(self):
    """As base64 of a PNG."""
    return self._call('GET', '/screenshot')

  def console(self):
    """Levels and texts of what the page has written since this was called before."""
    rows = self._call('POST', '/se/log', {'type': 'browser'})
    return [(row['level'], row['message']) for row in rows]

  def close(self):
    try:
      self._call('DELETE', '')
    finally:
      self._driver.terminate()
      self._driver.wait()
