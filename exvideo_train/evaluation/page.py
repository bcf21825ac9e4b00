"""Style and script of the report. Without the script, contact sheets, tables and curves stand there all the same."""

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1c1c1c;background:#fff}
main{max-width:1200px;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}h1,h2,h3,p,li,td,th{overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.9rem}.wide{overflow-x:auto}
td,th{padding:.25rem .8rem .25rem 0;text-align:right;vertical-align:top;border-bottom:1px solid #ddd}
tr>:nth-child(2){text-align:left}
td,thead th{white-space:nowrap}
th:first-child,.setting{text-align:left}th[scope=row],.setting{font-weight:normal;white-space:normal}
small{display:block;color:#555}.prompt small{display:inline}
.better,.worse,.higher,.lower{font-weight:600}.better{color:#006b4b}.worse{color:#a63600}
.not{white-space:normal;min-width:11rem;color:#555}
.key span{margin-right:1.5rem}.key i{display:inline-block;width:2.2rem;vertical-align:middle}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:1rem}
figure{margin:0}img{width:100%;height:auto}figcaption{font-size:.85rem;color:#444}
.pair{border-top:1px solid #ccc;margin-top:1.5rem}
.videos{display:flex;flex-wrap:wrap;gap:.5rem}.videos figure{flex:1 1 280px}video{width:100%;background:#eee}
.controls{display:flex;flex-wrap:wrap;gap:.8rem;align-items:center;margin:.4rem 0 1rem}
.slide{flex:1 1 200px;position:relative}.scrubber{width:100%;margin:0;height:2rem}
.mark{position:absolute;top:0;bottom:0;width:2px;background:#d55e00;pointer-events:none}
button{font:inherit;padding:.3rem 1rem}output{min-width:20rem;font-variant-numeric:tabular-nums}
:focus-visible{outline:3px solid #0072b2;outline-offset:2px}
.label{margin:.3rem 0 0;font-weight:600;font-size:.9rem}
.sheet{display:grid;grid-template-columns:repeat(6,1fr);gap:4px}
@media (max-width:600px){.sheet{grid-template-columns:repeat(3,1fr)}output{min-width:0}}
@media print{.videos,.controls{display:none}.pair,figure,tr{break-inside:avoid}.wide{overflow:visible}
table{font-size:7.5pt}td,thead th,.not{white-space:normal;min-width:0}main{max-width:none;padding:0}}
"""

SCRIPT = """
"use strict";
for (const pair of document.querySelectorAll(".pair")) {
  const videos = [...pair.querySelectorAll("video")];
  const scrubber = pair.querySelector(".scrubber");
  const play = pair.querySelector(".play");
  const output = pair.querySelector("output");
  const fps = Number(scrubber.dataset.fps), base = Number(scrubber.dataset.base);
  const perLatent = Number(scrubber.dataset.latent), last = Number(scrubber.max);
  if (videos.length === 0) { pair.querySelector(".controls").hidden = true; continue; }
  let timer = 0;
  const show = () => {
    const frame = Number(scrubber.value);
    // The middle of a frame: at its edge a player may show the one before.
    for (const video of videos) { video.currentTime = (frame + 0.5) / fps; }
    const latent = Math.ceil(frame / perLatent) + 1;
    const beyond = base && frame >= base ? ", beyond the base's " + base + " frames" : "";
    output.textContent = "frame " + (frame + 1) + " of " + (last + 1) + ", " + (frame / fps).toFixed(2) +
      " s, latent frame " + latent + beyond;
    scrubber.setAttribute("aria-valuetext", output.textContent);
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  const step = () => {
    // A step waits until every video shows the one before: they stay together on a slow machine too.
    if (videos.some(video => video.seeking)) { return; }
    if (Number(scrubber.value) >= last) { stop(); return; }
    scrubber.value = Number(scrubber.value) + 1;
    show();
  };
  scrubber.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(scrubber.value) >= last) { scrubber.value = 0; }
    play.textContent = "Pause";
    timer = setInterval(step, 1000 / fps);
  });
  show();
}
"""
