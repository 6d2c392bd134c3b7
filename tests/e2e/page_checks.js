// What a page must keep, in the browser: names and labels, contrast, ids, width. Returns what is wrong.
() => {
  const found = [];
  const seen = (e) => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true }) && e.getClientRects().length;
  for (const e of document.querySelectorAll('input, select, textarea'))
    if (!e.labels?.length && !e.ariaLabel) found.push(`no label: ${e.outerHTML.slice(0, 80)}`);
  for (const e of document.querySelectorAll('button, a[href]'))
    if (seen(e) && !(e.ariaLabel || e.textContent.trim())) found.push(`no name: ${e.outerHTML.slice(0, 80)}`);
  for (const e of document.querySelectorAll('[aria-labelledby], [aria-controls], [aria-describedby], label[for]'))
    for (const name of ['aria-labelledby', 'aria-controls', 'aria-describedby', 'for'])
      if (e.hasAttribute(name) && !document.getElementById(e.getAttribute(name))) found.push(`${name} of nothing: ${e.getAttribute(name)}`);
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((each) => each === id).length > 1) found.push(`twice: #${id}`);
  if (document.querySelectorAll('h1').length !== 1) found.push('not one h1');
  if (!document.documentElement.lang || !document.title) found.push('no language or title');
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) found.push(`${wide} pixels too wide`);

  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg, dialog:not([open]), .out-of-sight, :disabled, .toast, .skip') || !seen(e)) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(rgba(style.color)), light(ground(e))].toSorted((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: ${e.textContent.trim().slice(0, 40)}`);
  }
  return [...new Set(found)];
}
