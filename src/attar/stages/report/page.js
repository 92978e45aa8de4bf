// Everything reads without this: it copies code, and shows the photo nearest to the pointer on the map.
for (const button of document.querySelectorAll(".code button")) {
  button.hidden = false;
  button.onclick = async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // some browsers keep the clipboard from pages opened from disk
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1600);
  };
}
const map = document.querySelector("svg.map");
if (map) {
  const photos = new Map();
  for (const image of document.querySelectorAll("img[data-i]")) photos.set(image.dataset.i, image.src);
  for (const group of map.querySelectorAll("g[data-i]"))
    if (!photos.has(group.dataset.i)) photos.set(group.dataset.i, group.querySelector("image").getAttribute("href"));
  const spots = [...map.querySelectorAll(":scope > circle")]
    .filter((spot) => photos.has(spot.dataset.i))
    .map((spot) => ({ spot, x: spot.cx.baseVal.value, y: spot.cy.baseVal.value, title: spot.textContent }));
  const peek = document.querySelector(".peek");
  let last = null;
  const hide = () => {
    peek.hidden = true;
    last?.classList.remove("near");
    last = null;
  };
  const move = (event) => {
    const frame = map.getBoundingClientRect(), box = map.viewBox.baseVal, scale = frame.width / box.width;
    const x = (event.clientX - frame.left) / scale, y = (event.clientY - frame.top) / scale;
    let best = null, least = 60 * 60;
    for (const spot of spots) {
      const distance = (spot.x - x) ** 2 + (spot.y - y) ** 2;
      if (distance < least) [best, least] = [spot, distance];
    }
    if (!best) return hide();
    if (best.spot === last) return;
    last?.classList.remove("near");
    last = best.spot;
    last.classList.add("near");
    peek.hidden = false;
    peek.querySelector("img").src = photos.get(last.dataset.i);
    peek.querySelector("span").textContent = best.title;
    const side = best.x * scale > frame.width / 2 ? -peek.offsetWidth - 18 : 18;
    const top = Math.min(Math.max(best.y * scale - 60, 0), frame.height - peek.offsetHeight);
    peek.style.transform = `translate(${best.x * scale + side}px, ${top}px)`;
  };
  for (const title of map.querySelectorAll("title")) title.textContent = "";
  map.addEventListener("pointermove", move);
  map.addEventListener("pointerdown", move);
  map.addEventListener("pointerleave", hide);
}
