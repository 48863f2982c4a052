// WCAG's contrast between an element's text and the nearest opaque background behind it.
(element) => {
  const parse = (color) => color.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const front = parse(getComputedStyle(element).color);
  let back = null;
  for (let at = element; at && !back; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if ((color[3] ?? 1) === 1) back = color;
  }
  const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
