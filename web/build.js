// Bundles the chat page's libraries into lowlat/serve/static/vendor: one ES module per library, the
// style sheet and fonts (woff2) of KaTeX, and the licences. The output depends on the lock file only.

import { build } from "esbuild";
import { copyFile, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const modules = join(here, "node_modules");
const target = process.argv[2] ?? join(here, "../lowlat/serve/static/vendor");

const ENTRIES = {
  "dompurify.js": 'export { default } from "dompurify";',
  "highlight.js": 'export { default } from "highlight.js/lib/common";',
  "katex.js": 'export { default } from "katex";',
  "markdown-it.js": 'export { default } from "markdown-it";',
};

/** Writes one bundle; returns the names of the packages in it. */
async function bundle(name, contents) {
  const { metafile } = await build({
    stdin: { contents, resolveDir: here },
    outfile: join(target, name),
    bundle: true,
    charset: "utf8",
    format: "esm",
    legalComments: "none", // LICENSES.txt has them
    logLevel: "warning",
    metafile: true,
    minify: true,
    target: "es2022",
  });
  return Object.keys(metafile.inputs).flatMap((path) => /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(path)?.[1] ?? []);
}

async function styleMath() {
  const css = await readFile(join(modules, "katex/dist/katex.min.css"), "utf8");
  const woff2Only = css.replaceAll(/src:url\(fonts\/([\w-]+\.woff2)\) format\("woff2"\)[^;}]*/g, 'src:url($1) format("woff2")');
  await writeFile(join(target, "katex.css"), `${woff2Only.trim()}\n`);
  for (const [, font] of woff2Only.matchAll(/url\(([\w-]+\.woff2)\)/g)) {
    await copyFile(join(modules, "katex/dist/fonts", font), join(target, font));
  }
}

async function collectLicenses(names) {
  const parts = [];
  for (const name of names) {
    const { version, license } = JSON.parse(await readFile(join(modules, name, "package.json"), "utf8"));
    const file = (await readdir(join(modules, name))).find((entry) => /^licen[cs]e/i.test(entry));
    const text = await readFile(join(modules, name, file), "utf8");
    const body = text.replaceAll("\r\n", "\n").replaceAll(/[ \t]+$/gm, "").trim();
    parts.push(`${name} ${version}, ${license}\n\n${body}\n`);
  }
  await writeFile(join(target, "LICENSES.txt"), parts.join(`\n${"-".repeat(80)}\n\n`));
}

await rm(target, { recursive: true, force: true });
await mkdir(target, { recursive: true });
const packages = new Set();
for (const [name, contents] of Object.entries(ENTRIES)) {
  for (const found of await bundle(name, contents)) packages.add(found);
}
await styleMath();
await collectLicenses([...packages].sort());
