const shaded = document.getElementById("shaded"), numbers = document.getElementById("numbers");
shaded.addEventListener("change", ({ target }) => {
  shaded.dataset.quantity = target.value;
  for (const legend of shaded.querySelectorAll(".legend")) legend.hidden = legend.dataset.for !== target.value;
});
document.addEventListener("pointerover", ({ target }) => {
  const token = target.closest(".t");
  numbers.hidden = !token;
  if (!token) return;
  numbers.textContent = token.dataset.numbers;
  const at = token.getClientRects()[0], own = numbers.getBoundingClientRect();
  numbers.style.left = `${Math.max(4, Math.min(at.left, innerWidth - own.width - 8))}px`;
  numbers.style.top = `${at.top > own.height + 10 ? at.top - own.height - 6 : at.bottom + 6}px`;
});
for (const gone of ["scroll", "pointerleave"]) addEventListener(gone, () => (numbers.hidden = true), true);
